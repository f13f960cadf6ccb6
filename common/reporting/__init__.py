"""Records of finished stages, the published tables they fill, claims over those tables, and the pages made of them.

Nothing here imports torch or lightning, so that `assemble tables` answers at once and works where neither is installed.
"""
