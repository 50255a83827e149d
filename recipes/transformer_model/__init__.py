"""The second shipped model: a PixArt transformer on the reference model's autoencoder, text encoder and pictures.

``python -m recipes.transformer_model train`` makes it, ``evaluate`` measures it. What it made is shipped inside the
package and found through `prune_lab.assets`.
"""
