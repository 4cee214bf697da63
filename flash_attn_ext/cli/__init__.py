"""The commands of ``python -m flash_attn_ext``, one module each: ``add_arguments(parser)`` and ``run(args) -> int``."""
