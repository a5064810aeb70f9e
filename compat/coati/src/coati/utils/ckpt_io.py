"""ColossalChat's four checkpoint functions under their original import path, by Shardpoint.

Source: ColossalAI, `applications/ColossalChat/coati/utils/ckpt_io.py`.
"""

from shardpoint.ckpt_io import load_checkpoint, load_json, save_checkpoint, save_json

__all__ = ["load_checkpoint", "load_json", "save_checkpoint", "save_json"]
