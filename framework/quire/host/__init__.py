"""The parts of the plugin host; `quire.registry` puts them together."""
