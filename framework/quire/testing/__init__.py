"""The conformance kit: one pytest class per extension point, and the fakes that tests need."""
