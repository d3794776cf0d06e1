"""beartype as jaxtyping's import hook takes it, where an int will do for a float (PEP 484)."""

import beartype

check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
