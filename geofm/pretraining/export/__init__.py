"""A trained model as files: for geofm, for timm, for Hugging Face and as a STAC item.

model    the model artifact: write it, load it, compute its features
card     the model card of the artifact
hub      a folder for Hugging Face, with costs and digest
mlm      a STAC item of the Machine Learning Model extension
"""
