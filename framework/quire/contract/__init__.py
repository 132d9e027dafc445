"""The plugin contract, one file per extension point. Authors import it through `quire.plugin`."""
