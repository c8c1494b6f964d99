"""Servers that lie about what a round is, and thieves who lie about who they are, over Flower's own classes."""

import logging
import math
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("flwr")

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from test_federation import configs, fedavg

from experiments.federation.local import LocalGrid
from smark_jax import aggregation, codes, extraction, federation, keys
from smark_jax.aggregation import protocol
from smark_jax.aggregation.protocol import messages, party
from smark_jax.federation import identities, wire

KEY = keys.from_bytes(bytes(32))
VICTIM = 0
WEIGHTS = 200


@pytest.fixture(autouse=True)
def quiet_and_tidy(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    caplog.set_level(logging.CRITICAL, "flwr")


def update_of(partition: int) -> np.ndarray:
    return np.random.default_rng(partition).normal(0, 0.1, WEIGHTS).astype(np.float32)


def model(fill: float = 0.5) -> ArrayRecord:
    return ArrayRecord({"w": Array(np.full(WEIGHTS, fill, np.float32))})


def train(message: Message, context: Context) -> Message:
    """An update that is the participant's own, in proportion to the rate; a model far off has no gradient."""
    given = message.content["arrays"]["w"].numpy()
    rate = message.content["config"].get("rate", 1.0) * context.run_config.get("rate", 1.0)
    moved = given + update_of(context.node_config["partition-id"]) * rate * (given[0] < 1e3)
    metrics = {"num-examples": 10, "victim": float(context.node_config["partition-id"] == VICTIM)}
    arrays = ArrayRecord({"w": Array(moved.astype(np.float32))})
    return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord(metrics)}), reply_to=message)


def app() -> ClientApp:
    made = ClientApp(mods=[federation.masked_mod])
    made.train()(train)

    @made.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1})}), reply_to=message)

    return made


class Liar(federation.Masked):
    """Tells each participant what ``lie(node, content)`` makes of the honest message."""

    def __init__(self, lie=lambda node, content: content, inner: FedAvg | None = None, **options) -> None:
        super().__init__(inner or fedavg(), **options)
        self._lie = lie

    def configure_train(self, *arguments):
        sent = []
        for honest in super().configure_train(*arguments):
            content, node = honest.content, honest.metadata.dst_node_id
            if "arrays" in content:
                content = self._lie(node - 100, content)
            sent.append(Message(content, dst_node_id=node, message_type="train"))
        return sent


def opened(strategy, grid) -> np.ndarray | None:
    """What one round tells the server: the change of the model, or nothing."""
    try:
        result = strategy.start(grid, model(), num_rounds=1, timeout=5)
    except protocol.ProtocolError:
        return None
    return result.arrays["w"].numpy() - 0.5 if strategy.results[0].nodes else None


def is_the_victims(change: np.ndarray | None) -> bool:
    return change is not None and np.corrcoef(change, update_of(VICTIM))[0, 1] > 0.99


def reasons(grid: LocalGrid) -> str:
    return "\n".join(reply.error.reason for reply in grid.received if reply.has_error())


# 1: the server's setup


def test_a_roster_of_one_is_refused_by_the_client():
    grid = LocalGrid(app(), configs(1))
    assert opened(Liar(), grid) is None
    assert "a quorum of at least 3 of 1 parties" in reasons(grid)
    # Control: whose operator agreed to it is opened.
    assert is_the_victims(opened(Liar(), LocalGrid(app(), configs(1, least_parties=1))))


def test_a_quorum_of_one_in_a_full_roster_is_refused_by_the_clients():
    def lost(node: int, message: Message) -> bool:
        return node != 100 and "arrays" in message.content

    grid = LocalGrid(app(), configs(4), lost)
    assert opened(Liar(quorum=1), grid) is None
    assert "a quorum of at least 3 of 4 parties" in reasons(grid)
    consenting = LocalGrid(app(), configs(4, least_parties=1, least_share=0.0), lost)
    assert is_the_victims(opened(Liar(quorum=1), consenting))


ROSTER = [messages.identity_key(keys.from_bytes(bytes([p + 1]) * 32)) for p in range(6)]


@pytest.mark.parametrize(
    ("lie", "refusal"),
    [
        ({"quorum": 4}, "a quorum of at least 5 of 6"),
        ({"threshold": 4}, "a threshold of 5 to 5"),
        ({"threshold": 6}, "a threshold of 5 to 5"),
        ({"degree": 2, "threshold": 2}, "the full graph"),
        ({"degree": 7}, "an even degree, or 5"),
        ({"bind_model": False}, "masks bound to the model"),
        ({"roster": (ROSTER[0],) * 6}, "distinct identities"),
        ({"roster": (*ROSTER[:5], bytes(31))}, "distinct identities"),
        ({"roster": (*ROSTER[:5], bytes(32))}, "only identities of this party's roster"),
        ({"num_words": 0}, "at least one word"),
        ({"round": -1}, "a round below 2"),
        ({"session": bytes(65)}, "a session of at most"),
        ({"quorum": 7}, "a quorum of 1 to 6"),
    ],
)
def test_every_parameter_of_a_setup_is_rechecked_by_the_party(lie, refusal):
    honest, identity = protocol.setup(ROSTER, 3), keys.from_bytes(bytes([1]) * 32)
    policy = protocol.Policy(known=tuple(ROSTER))
    party.join(honest, identity, keys.new(), policy)
    with pytest.raises(protocol.ProtocolError, match=refusal):
        party.join(honest._replace(**lie), identity, keys.new(), policy)


def test_two_thirds_is_exact_at_every_size():
    for n in range(1, 400):
        assert protocol.Policy(least_parties=1).least_quorum(n) == 2 * n // 3 + 1


def test_a_sparse_graph_that_is_unsafe_or_torn_apart_by_the_server_is_refused():
    """Whoever has seen the ring may declare lost just those who connect two parts of it."""
    n = 90
    safe = aggregation.neighbourhood(n, 0.1, 0.05, security_bits=10)
    assert safe.degree < n - 1
    roster = [bytes([1, p]) + bytes(30) for p in range(n)]
    setup = protocol.setup(roster, 3, neighbourhood=safe)
    policy = protocol.Policy(corruption_rate=0.05, security_bits=10)
    policy.check(setup)
    everybody, seed = tuple(range(n)), b"seed"
    policy.check_graph(setup, seed, everybody, everybody)
    ring = protocol.parameters.ring_of(everybody, seed)
    lost = {ring[(i + side) % n] for side in (0, n // 2) for i in range(safe.degree // 2)}
    assert n - len(lost) >= setup.quorum  # as far as numbers go all is well
    with pytest.raises(protocol.ProtocolError, match="neighbours in a row"):
        policy.check_graph(setup, seed, everybody, set(everybody) - lost)
    scattered = set(ring[:: n // (n // 10)])  # as many as honest drop-outs are, here and there
    policy.check_graph(setup, seed, everybody, set(everybody) - scattered)
    with pytest.raises(protocol.ProtocolError, match="a graph that is safe with 4 of 90"):
        policy.check_graph(setup._replace(threshold=safe.degree // 2), seed, everybody, everybody)
    with pytest.raises(protocol.ProtocolError, match="a graph that is safe with"):
        policy._replace(corruption_rate=0.3).check_graph(setup, seed, everybody, everybody)
    policy._replace(security_bits=-math.inf).check_graph(setup, seed, everybody, set())


def test_options_of_the_node_configuration_are_checked(tmp_path):
    read = federation.mod.consent.read
    assert read({}).policy == protocol.Policy()
    for bad in ({"smark-least-partys": 2}, {"smark-least-share": "0.5"}, {"smark-bind-model": 0}):
        with pytest.raises(ValueError, match="masked_mod: expected"):
            read(bad)
    for bad in ({"smark-least-share": 1.5}, {"smark-least-parties": 0}, {"smark-roster": str(tmp_path / "none")}):
        with pytest.raises(ValueError, match="expected"):
            read(bad)


# 2 and 3: what masks are bound to


def formats(node: int, content: RecordDict) -> RecordDict:
    """A clip for the others at which all their changes are next to nothing."""
    record = content[wire.RECORD]
    form = wire.load(record["format"])
    clip = 0.5 if node == VICTIM else 1e4
    lied = form._replace(clip=clip) if hasattr(form, "_replace") else (clip, *form[1:])
    record["format"] = wire.dump(lied)
    return content


def configuration(node: int, content: RecordDict) -> RecordDict:
    content["config"] = ConfigRecord({**dict(content["config"]), "rate": float(node == VICTIM)})
    return content


def decoy(node: int, content: RecordDict) -> RecordDict:
    told = dict(content.items())
    told["arrays"] = model(0.5 if node == VICTIM else 1e6)
    return RecordDict({"decoy": model(), **told})


def renamed_first(node: int, content: RecordDict) -> RecordDict:
    """The same records in another order: a train function that takes the first one takes another."""
    told = dict(content.items())
    other = {"other": model(1e6)}
    return RecordDict({**told, **other} if node == VICTIM else {**other, **told})


@pytest.mark.parametrize("lie", [formats, configuration, decoy])
def test_what_only_the_victim_is_told_opens_nothing(lie):
    strategy = Liar(lie, metrics=("victim",)) if lie is formats else Liar(lie)
    assert opened(strategy, LocalGrid(app(), configs(4))) is None


@pytest.mark.parametrize("lie", [formats, configuration, decoy, renamed_first])
def test_whatever_differs_in_a_message_makes_another_task(lie):
    """Of two participants who were told different things; the control is the same thing told twice."""
    from smark_jax.federation import task

    def digest(node: int, lied: bool) -> bytes:
        content = RecordDict({"arrays": model(), "config": ConfigRecord({"server-round": 1})})
        content = wire.put(content, wire.Items(format=task.Format()))
        content = lie(node, content) if lied else content
        form = wire.take(content).format
        del content[wire.RECORD]
        return task.digest(content, form, message_type="train", run_config={})

    assert digest(0, False) == digest(1, False)
    assert digest(0, True) != digest(1, True)


def test_masks_are_bound_to_the_run_configuration_and_the_function():
    from smark_jax.federation import task

    content, form = RecordDict({"arrays": model()}), task.Format()

    def digest(**changes) -> bytes:
        return task.digest(content, form, **({"message_type": "train", "run_config": {"rate": 1}} | changes))

    others = [{"run_config": {"rate": value}} for value in (1.0, True, "1", 2)] + [{"message_type": "train.other"}]
    assert len({digest(), *(digest(**change) for change in others)}) == 6

    class OwnConfig(LocalGrid):
        def _context(self, node):
            context = super()._context(node)
            context.run_config["rate"] = 1.0 if node == 100 else 0.0
            return context

    assert opened(Liar(), OwnConfig(app(), configs(4))) is None


def test_without_the_models_values_all_else_is_bound():
    """Where every participant has a copy of its own, a lie in the configuration is still noticed."""
    options = {"bind_model": False}
    assert opened(Liar(configuration, **options), LocalGrid(app(), configs(4, bind_model=False))) is None
    honest = opened(Liar(**options), LocalGrid(app(), configs(4, bind_model=False)))
    assert honest is not None
    # What cannot be cured then: models made to single out one participant. Operators agree to it, or refuse.
    dead = lambda node, content: RecordDict(  # noqa: E731
        {**dict(content.items()), "arrays": model(0.5 if node == VICTIM else 1e6)}
    )
    assert is_the_victims(opened(Liar(dead, **options), LocalGrid(app(), configs(4, bind_model=False))))
    assert opened(Liar(dead, **options), LocalGrid(app(), configs(4))) is None


def test_updates_weighted_by_a_metric_of_the_servers_choice_are_refused():
    inner = fedavg(weighted_by_key="victim")
    grid = LocalGrid(app(), configs(4))
    assert opened(Liar(inner=inner), grid) is None
    assert "weighted by 'num-examples'" in reasons(grid)
    assert is_the_victims(opened(Liar(inner=inner), LocalGrid(app(), configs(4, weight="victim"))))


def test_a_train_functions_error_tells_the_server_nothing():
    made = ClientApp(mods=[federation.masked_mod])

    @made.train()
    def fails(message: Message, context: Context) -> Message:
        raise KeyError("patient 4711")

    grid = LocalGrid(made, configs(3))
    assert opened(Liar(), grid) is None
    assert "4711" not in reasons(grid)
    assert "an update to mask, but got an error" in reasons(grid)


# 5: who is who


def with_files(folder: Path, n: int, **options) -> tuple[dict[int, dict], list[bytes]]:
    nodes, public = configs(n, **options), []
    for node, config in nodes.items():
        path = folder / f"{node}.identity"
        public.append(identities.create(path))
        config["smark-identity"] = str(path)
    return nodes, public


def test_a_thief_who_claims_the_victims_identity_gets_no_copy_and_locks_nobody_out(tmp_path):
    """Node 100 answers first, and claims to be the participant at node 102: its copy would convict that one."""
    nodes, public = with_files(tmp_path, 5, bind_model=False)

    def claim(reply: Message) -> Message:
        if reply.metadata.src_node_id == 100 and reply.has_content() and wire.RECORD in reply.content:
            record = reply.content[wire.RECORD]
            if "identity" in record:
                own = wire.load(record["identity"])
                record["identity"] = wire.dump(
                    public[2] if isinstance(own, bytes) else own._replace(identity=public[2])
                )
        return reply

    inner = FedAvg(min_train_nodes=1, min_available_nodes=1, min_evaluate_nodes=1)
    strategy = Liar(inner=inner, fingerprints=federation.Fingerprints(KEY, num_chips=16))
    strategy._mark = lambda arrays: None
    strategy._copy_for = lambda node, arrays: arrays  # whose copy it is matters here, not what is in it
    grid = LocalGrid(app(), nodes, changes=claim)
    strategy.start(grid, model(), num_rounds=1, timeout=5)
    given = [m.metadata.dst_node_id for m in grid.sent if "arrays" in m.content]
    assert sorted(given) == [101, 101, 102, 102, 103, 103, 104, 104]  # to train, and to evaluate
    assert strategy.results[0].nodes == (101, 102, 103, 104)
    assert public[2].hex() in strategy.serials
    assert len(strategy.serials) == 4


def test_a_proof_is_good_for_one_challenge_at_one_address():
    from smark_jax.federation.contacts import Contacts

    contacts = Contacts(b"session")
    challenge = contacts.challenges([1, 2, 3])
    identity = keys.new()
    relayed = messages.introduce(identity, challenge[1], 2)  # the owner is at 2; the thief at 1 passed his on
    contacts.introduce(1, relayed)
    assert not contacts.identities
    contacts.introduce(2, messages.introduce(identity, challenge[2], 2))
    contacts.introduce(3, messages.Introduction(messages.identity_key(identity), bytes(64)))
    assert list(contacts.identities) == [2]
    # The owner comes back at another node and takes over; an old proof does not.
    again = contacts.challenges([3, 4])
    contacts.introduce(4, messages.introduce(identity, again[4], 4))
    assert list(contacts.identities) == [4]
    contacts.introduce(2, messages.introduce(identity, challenge[2], 2))
    assert list(contacts.identities) == [4]
    assert contacts.serial(4) == 0


# 6: two answers


def test_copies_of_a_stored_context_answer_each_stage_once(tmp_path):
    """Flower hands out a copy of a client's state with every message; eight at the same time, one answer."""
    from experiments.lying_server import parties

    crowd = parties.Parties(tmp_path)
    setup = protocol.setup(crowd.roster, 50, 1, session=b"run")
    advertised = {}
    for p in range(4):
        joined = at_once(crowd, p, wire.put(RecordDict(), wire.Items(setup=setup)))
        advertised[p] = joined.keys
    request = wire.put(RecordDict(), wire.Items(requests=((1, messages.ShareRequest(advertised)),)))
    assert isinstance(at_once(crowd, 0, request).shares, messages.Shares)
    # From the state before the answer, as after a crash between the answer and the storing of the state.
    with pytest.raises(protocol.ProtocolError, match="which was answered already"):
        crowd.app(parties.message(0, wire.put(RecordDict(), wire.Items(setup=setup))), fresh(crowd, 0))


def fresh(crowd, party_: int) -> Context:
    return Context(1, 100 + party_, crowd.contexts[party_].node_config, RecordDict(), {})


def at_once(crowd, party_: int, sent: RecordDict) -> wire.Items:
    from experiments.lying_server import parties

    copies = [crowd.copy_of(party_) for _ in range(8)]
    answers, errors, start = [], [], threading.Barrier(8)

    def ask(context: Context) -> None:
        start.wait()
        try:
            answers.append((context, wire.take(crowd.app(parties.message(party_, sent), context).content)))
        except ValueError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=ask, args=(context,)) for context in copies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(answers) == 1, errors
    assert len(errors) == 7
    assert all("answered already" in error for error in errors)
    crowd.contexts[party_] = answers[0][0]
    return answers[0][1]


def test_a_ledger_that_cannot_be_written_answers_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(protocol.ProtocolError, match="ledger: expected to write"):
        federation.mod.ledger.claim(tmp_path / "file", b"session", "keys", 1)


# 8: participants' copies in later rounds


def test_copies_of_later_rounds_are_traced_when_a_bias_was_zero_at_the_start():
    marks = federation.Fingerprints(KEY, num_chips=64, strength=0.05)
    shapes = {"bias": 300, "w": 4000}
    start = {"bias": np.zeros(300, np.float32), "w": np.random.default_rng(0).normal(size=4000).astype(np.float32)}
    made = ClientApp(mods=[federation.masked_mod])

    @made.train()
    def moves(message: Message, context: Context) -> Message:
        rng = np.random.default_rng(context.node_config["partition-id"])
        given = message.content["arrays"]
        moved = {n: given[n].numpy() + rng.normal(0, 0.1, size).astype(np.float32) for n, size in shapes.items()}
        arrays = ArrayRecord({name: Array(value) for name, value in moved.items()})
        return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})}), reply_to=message)

    models: list[dict[str, np.ndarray]] = []
    grid = LocalGrid(made, configs(3, bind_model=False))
    strategy = federation.Masked(fedavg(), fingerprints=marks)
    strategy.start(
        grid,
        ArrayRecord({name: Array(value) for name, value in start.items()}),
        num_rounds=2,
        timeout=5,
        evaluate_fn=lambda round_, arrays: models.append({n: arrays[n].numpy() for n in arrays}),
    )
    given = [m for m in grid.sent if "arrays" in m.content]
    assert len(given) == 6
    assert not models[0]["bias"].any()
    base = models[1]
    assert base["bias"].any()
    mark = federation.participant_mark(base, marks)
    words = np.asarray(codes.codebook(keys.derive(KEY, "code"), range(3), 64), np.float64)
    for message in given[3:]:
        leak = {name: array.numpy() for name, array in message.content["arrays"].items()}
        chips = np.asarray(extraction.extract(leak, base, mark), np.float64)
        statistics = words @ chips / np.linalg.norm(chips)
        own = strategy.serial(message.metadata.dst_node_id)
        assert statistics[own] > 0.99 * math.sqrt(64)
        assert np.delete(statistics, own).max() < 4


# All together


def test_sixty_lying_servers_open_nothing_and_hang_nobody(tmp_path):
    from experiments.lying_server import __main__ as servers
    from experiments.lying_server import parties

    crowd = parties.Parties(tmp_path)
    rows = [servers.trial(crowd, 0, number) for number in range(60)]
    assert [row["breach"] for row in rows if row["breach"]] == []
    assert sum(row["sums"] > 0 for row in rows) >= 3  # honest ones among them do open a sum
    assert sum(bool(row["errors"]) for row in rows) > 20


@pytest.mark.parametrize(
    ("protection", "plans"),
    [
        ("no policy", ("roster of one", "quorum of one", "invented parties", "unbound model")),
        ("nothing bound", ("format", "weight", "configuration", "dead models", "decoy")),
        ("no ledger", ("two questions", "old state")),
    ],
)
def test_the_judge_convicts_the_same_servers_where_a_protection_is_missing(tmp_path, protection, plans):
    from experiments.lying_server import __main__ as servers
    from experiments.lying_server import judge, parties
    from experiments.lying_server.server import LyingServer, Plan

    with servers.control(protection) as agreed:
        crowd = parties.Parties(tmp_path, agreed)
        for name in plans:
            crowd.begin(1)
            heard = LyingServer(crowd, Plan(name, 0.0, False), np.random.default_rng(1)).play()
            assert judge.breach(judge.opened(heard), servers.LEAST), name
