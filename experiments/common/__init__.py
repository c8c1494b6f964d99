"""What experiments share: sections and their command line, networks to attack, other codes to compare with."""
