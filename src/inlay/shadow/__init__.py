"""ShadowPEFT's small network beside a model (the method is `methods.shadow`): what it is, and how it walks along."""
