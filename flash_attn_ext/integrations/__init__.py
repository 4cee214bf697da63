"""Adapters to other libraries, one module each; nothing here is imported by ``import flash_attn_ext``."""
