"""Papers hold methods: fields and classes that moved when the papers were cut down to what they invented.

One module for each paper, with `migrate(config)`: the configuration of an old record as the new code would state it.
Nothing about the experiments changed, so what was measured stays; the records keep their old hashes beside the new.
"""
