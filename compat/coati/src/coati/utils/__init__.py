"""What ColossalChat's `coati.utils` offers of its checkpoint functions, by Shardpoint."""

from coati.utils.ckpt_io import load_checkpoint, save_checkpoint

__all__ = ["load_checkpoint", "save_checkpoint"]
