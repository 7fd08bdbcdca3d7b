"""All that this package knows of transformers. docs/design.md, section 7, lists each name of theirs that is read."""
