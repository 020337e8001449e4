"""`opsin chat --beams`: what cannot stand beside it."""

from opsin.errors import ConfigError


def check_beams(
    beams: int | None,
    *,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    repetition_penalty: float,
    seed: int | None,
) -> None:
    """Raises ConfigError naming every option that a search for the likeliest answer has no use for."""
    if beams is None:
        raise ConfigError("--length-penalty has no effect without --beams; add --beams 5")
    given = {
        "--temperature": temperature != 0,
        "--top-k": top_k is not None,
        "--top-p": top_p is not None,
        "--repetition-penalty": repetition_penalty != 1,
        "--seed": seed is not None,
    }
    if clashing := [name for name, is_given in given.items() if is_given]:
        raise ConfigError(
            f"--beams searches for the likeliest answer and draws nothing: leave out {', '.join(clashing)}, or --beams"
        )
