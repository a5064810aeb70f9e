"""Only ColossalChat's import path of the four checkpoint functions: see `coati.utils.ckpt_io`."""
