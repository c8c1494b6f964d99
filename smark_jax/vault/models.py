"""The owner's models: the base that copies are made from, and the settings fixed before the first copy is sold."""

import dataclasses
import functools
import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from smark_jax import _documents, _validate, carriers, codes, files, keys
from smark_jax.carriers import marks
from smark_jax.vault import _text, bases, documents, folder, openings, shapes, store, versions
from smark_jax.vault import public as publicity


class Model(NamedTuple):
    """The settings of a model, which never change.

    Attributes:
      name: of the model.
      base: content hash of the base weights.
      spec: the carrying leaves.
      num_chips: m.
      alpha: bound on the probability of accusing anybody innocent on one occasion.
      strength: of copies, unless another one is requested when they are issued.
      created: when it was added.
      public: content hash of the public model whose weights carry nothing, if one was named.
      versions: the algorithms that copies are made and traced with.
      shape: how far each coordinate moves, by the digest of the file that says so; None where all leaves are marked
        alike.
      form: what the name of the base's file ends with, and so those of copies; empty where they are folders.
    """

    name: str
    base: str
    spec: carriers.Spec
    num_chips: int
    alpha: float
    strength: float
    created: str
    public: str | None = None
    versions: documents.Versions = versions.WHITE
    shape: documents.Shape | None = None
    form: str = bases.SAFETENSORS


@dataclasses.dataclass(frozen=True)
class OpenModel:
    """A model of an open vault. Costly parts are computed on first use and cached.

    Attributes:
      vault: the vault.
      settings: the model's settings, which never change.
    """

    vault: folder.Vault
    settings: Model

    @property
    def name(self) -> str:
        """The model's name."""
        return self.settings.name

    @property
    def base_file(self) -> Path:
        """The file or folder of the base."""
        return bases.path(self.vault, self.name, self.settings.base, self.settings.form)

    @functools.cached_property
    def base(self) -> dict[str, np.ndarray]:
        """The leaves of the base.

        Raises:
          SmarkError: when the file in the vault is not the one that was added.
        """
        path = self.base_file
        cause = "Restore it from your backup, or copy the base there."
        if not path.exists():
            raise _validate.fail("vault", f"the base of {self.name} in {path}", "no such file", cause)
        leaves = files.read(path, max_bytes=files.ANY_SIZE).leaves
        if files.content_hash(leaves) != self.settings.base:
            raise _validate.fail("vault", f"the base of {self.name} in {path}", "another content", cause)
        return leaves

    @functools.cached_property
    def form(self) -> files.Form:
        """What makes copies in the form of the base."""
        return files.Form(self.base_file)

    @functools.cached_property
    def shape(self) -> carriers.Shape | None:
        """The shape of the model's mark; None where all leaves are marked alike.

        Raises:
          SmarkError: when its file in the vault is missing, or does not hold the shape that was committed to.
        """
        known = self.settings.shape
        if known is None:
            return None
        place, cause = (
            self.vault.folder / folder.MODELS,
            "Restore it from your backup: no copy is made or read without.",
        )
        return shapes.read("vault", place, self.settings.versions.shape, known.digest, cause, max_bytes=files.ANY_SIZE)

    @functools.cached_property
    def mark(self) -> carriers.Mark:
        """The mark: carrying leaves and shape as stored in the vault, and the carrier redrawn from its key."""
        key, settings = carrier_key(self.vault, self.name), self.settings
        return versions.mark(settings.versions, key, settings.spec, self.shape, settings.num_chips, settings.strength)

    def parts(self, content: str) -> list[tuple[int, ...]]:
        """The pieces of the carrier that evidence on a suspect of this content hash may open, smallest share first."""
        root = pieces_root(self.vault, self.name, self.settings.versions)
        return [] if root is None else openings.parts(root, content, self.mark.carrier.num_pieces)

    @property
    def code(self) -> versions.Code:
        """The code that the model's codewords come from."""
        return versions.CODES[self.settings.versions.code]

    @property
    def decoder(self) -> str:
        """The name of the decoder that the model's verdicts use."""
        return versions.DECODERS[self.settings.versions.decoder]

    @property
    def draw(self) -> documents.Draw | None:
        """What codewords were drawn with (:mod:`smark_jax.vault.drafts`); None where they are the owner's own."""
        text = store.draw(self.vault.connection, self.name)
        return documents.stored(documents.Draw, text) if text else None

    @property
    def _public(self) -> keys.SecretKey | None:
        return draw.key if (draw := self.draw) else None

    @property
    def codewords(self) -> Callable[[Sequence[int]], np.ndarray]:
        """As :meth:`words`, for threads that may not ask the vault."""
        words = functools.partial(self.code.words, code_key(self.vault, self.name), public=self._public)
        return lambda serials: np.asarray(words(serials, self.settings.num_chips))

    def words(self, serials: Sequence[int]) -> np.ndarray:
        """The codewords of these customers, int8, shape [K, m]."""
        return self.codewords(serials)

    def own_words(self, serials: Sequence[int]) -> np.ndarray:
        """The owner's own words of these serials, which differ from codewords where those were drawn."""
        return np.asarray(self.code.words(code_key(self.vault, self.name), serials, self.settings.num_chips))

    def book(self, num_customers: int) -> codes.Codebook:
        """The codewords of serials 0 to N - 1, computed when needed."""
        chips = self.settings.num_chips
        return self.code.book(code_key(self.vault, self.name), num_customers, chips, public=self._public)


def add(
    vault: folder.Vault,
    name: str,
    leaves: Mapping[str, np.ndarray],
    *,
    num_chips: int = 304,
    alpha: float = 1e-6,
    made: shapes.Made | None = None,
    strength: float = marks.WHITE,
    match: str | None = None,
    public: Mapping[str, np.ndarray] | None = None,
    form: files.Form | None = None,
) -> OpenModel:
    """Adds a model: writes base and shape into the vault, chooses the carrying leaves, and fixes its settings.

    :func:`smark_jax.carriers.roles` decides which leaves can carry.

    Args:
      vault: an open vault.
      name: of the model.
      leaves: the base, as from ``files.read`` or ``files.flatten``.
      num_chips: m.
      alpha: bound on the probability of accusing anybody innocent on one occasion.
      made: the shape and its strength, from :mod:`smark_jax.vault.shapes`; its leaves carry. None marks all leaves
        alike, as models of older versions are marked.
      strength: of copies of a model without a shape, as :func:`smark_jax.embedding.embed` takes it.
      match: a regular expression; only leaves whose names match it carry.
      public: the leaves of a public model that the base was trained from. Leaves of the base with at least half of
        their weights still public carry nothing, since anybody could subtract them from a copy.
      form: of the file that the leaves were read from, if any. The vault keeps it byte for byte, and copies differ from
        it in the weights that carry alone. Without one, or where carrying leaves are compressed in it, the vault keeps
        the base as safetensors.

    Raises:
      SmarkError: when the name is taken or invalid as a file name, a setting is out of range, or the base cannot carry.
    """
    _text.model_name(name)
    _validate.probability("add-model", "alpha", alpha)
    strength = made.strength if made else strength
    check_strength("add-model", strength)
    check_chips(num_chips, alpha)
    spec = choose(leaves, match, public)
    if made:
        paths = {leaf.path for leaf in made.shape.leaves}
        spec = carriers.select(files.nest(leaves), lambda path: path in paths)
    count = made.shape.num_coordinates if made else spec.num_weights
    if num_chips > count:
        got = f"{num_chips:,} chips for {count:,} carrying weights"
        raise _validate.fail(
            "add-model", "fewer chips than carrying weights", got, "Choose fewer chips, or let more leaves carry."
        )
    form = form if form and bases.can_carry(form, spec) else None
    known = files.content_hash(public) if public is not None else None
    model = Model(name, files.content_hash(leaves), spec, num_chips, alpha, strength, _documents.now(), known)
    if made:
        model = model._replace(versions=versions.NEW, shape=made.document)
    if form:
        model = model._replace(form=form.suffix)
    refuse_taken(vault, name)
    bases.keep(bases.path(vault, name, model.base, model.form), leaves, form)
    if made:
        shapes.write(vault.folder / folder.MODELS, made.shape)
    stored = model._asdict() | {"spec": documents.rows(spec), "shape": model.shape or documents.MISSING}
    document = documents.text(documents.Model(**stored))
    with store.transaction(vault.connection):
        refuse_taken(vault, name)
        folder.record(vault, "model added", {"models": [(name, document)]}, model=name, base=model.base)
    return OpenModel(vault, model)


def check_chips(num_chips: int, alpha: float) -> None:
    """Refuses so few chips that nobody could ever be accused.

    Raises:
      SmarkError: stating how many it takes.
    """
    _validate.positive("add-model", "num_chips", num_chips)
    if num_chips < (fewest := fewest_chips(alpha, 2)):
        expected = f"at least {fewest} chips, since with fewer nobody among even two customers can be accused"
        cause = f"1 + log2(N / alpha) chips are the fewest for N customers; 304 bear some damage. alpha is {alpha:g}."
        raise _validate.fail("add-model", expected, str(num_chips), cause)


def choose(
    leaves: Mapping[str, np.ndarray], match: str | None = None, public: Mapping[str, np.ndarray] | None = None
) -> carriers.Spec:
    """The leaves of a new model that may carry, as :func:`add` takes ``match`` and ``public``."""
    tree = files.nest(leaves)
    chosen = carriers.select(tree, match)
    if public is None:
        return chosen
    known = {name for name, share in publicity.shares(leaves, public).items() if share >= publicity.MOST}
    if known >= {leaf.path for leaf in chosen.leaves}:
        cause = "Anybody with the public model can subtract it from a copy. Train more of it, or mark no copy."
        raise _validate.fail("add-model", "leaves that you trained yourself", "public weights alone", cause)
    fits = re.compile(match or "").search
    return carriers.select(tree, lambda path: path not in known and fits(path))


def unfit(model: OpenModel) -> dict[str, carriers.Role]:
    """Leaves of a model that an older version marked although they should carry nothing, by name."""
    roles = carriers.roles(dict(model.base))
    return {leaf.path: roles[leaf.path] for leaf in model.settings.spec.leaves if not roles[leaf.path].carries}


def fewest_chips(alpha: float, num_customers: int) -> int:
    r"""The fewest chips with which anybody among N customers can be accused.

    The statistic is largest when all m chips agree, :math:`T = \sqrt m`. By chance this happens with two-sided
    probability :math:`2 \cdot 2^{-m}`, so :math:`m \ge 1 + \log_2(N / \alpha)`.
    """
    return math.ceil(1 + math.log2(num_customers) - math.log2(alpha))


def check_strength(who: str, strength: float) -> None:
    """Refuses a strength that is not a number above 0 and up to 1.

    Raises:
      SmarkError: stating which strengths are useful.
    """
    _validate.finite_number(who, "strength", strength)
    if strength > 1:
        cause = "At 1 the mark is as large as what it marks; embedding.calibrate finds what a network bears."
        desk = "At 1 the mark is as large as what it marks. Leave --strength out, and smark chooses it."
        raise _validate.fail(who, "a strength above 0 and up to 1", f"{strength:g}", cause, desk=desk)


def refuse_taken(vault: folder.Vault, name: str) -> None:
    """Refuses a name that another model has.

    Raises:
      SmarkError: when the name is taken, or is not valid as a file name.
    """
    _text.model_name(name)
    if name in names(vault):
        cause = "A model's settings never change, since they are committed to: add it under another name."
        raise _validate.fail("add-model", "a new name for a model", f"{name!r}, which is taken", cause)


def names(vault: folder.Vault) -> list[str]:
    """The models' names in the order in which they were added."""
    return store.model_names(vault.connection)


def get(vault: folder.Vault, name: str) -> OpenModel:
    """The model with this name. A command should look it up once and pass it on.

    Raises:
      SmarkError: when there is no such model, or it needs a newer version of smark-jax.
    """
    known = names(vault)
    text = store.model_document(vault.connection, name) if name in known else None
    if text is None:
        cause = f"Models in this vault: {', '.join(known) or 'none yet'}. 'smark add-model' adds one."
        raise _validate.fail("vault", "the name of a model", repr(name), cause)
    found = documents.stored(documents.Model, text)
    used = found.versions or documents.Versions()
    if unknown := versions.unknown(used):
        cause = "A newer smark-jax added the model: upgrade smark-jax."
        raise _validate.fail("vault", f"algorithms of {name} that this version knows", unknown, cause)
    form = bases.SAFETENSORS if isinstance(found.form, documents.Missing) else found.form
    optional = {"public": found.public or None, "versions": used, "shape": found.shape or None, "form": form}
    changed = {"spec": documents.spec(found.spec), **optional}
    return OpenModel(vault, Model(**{**found._asdict(), **changed}))


def carrier_key(vault: folder.Vault, name: str) -> keys.SecretKey:
    """The key of a model's carrier, which evidence opens."""
    return keys.derive(vault.master, name, "carrier")


def pieces_root(vault: folder.Vault, name: str, named: documents.Versions) -> str | None:
    """The root over the keys of the carrier's pieces; None where the model's carrier has none."""
    return openings.root(carrier_key(vault, name)) if named.carrier in versions.IN_PIECES else None


def code_key(vault: folder.Vault, name: str) -> keys.SecretKey:
    """The key of a model's codewords, which nobody else ever sees."""
    return keys.derive(vault.master, name, "code")


def probes_key(vault: folder.Vault, name: str) -> keys.SecretKey:
    """The key of the probe images, by which a model is traced through its answers."""
    return keys.derive(vault.master, name, "probes")


def spec_digest(spec: tuple[documents.LeafRow, ...]) -> str:
    """The SHA-256 of the carrying leaves' document."""
    return hashlib.sha256(documents.canonical(spec)).hexdigest()
