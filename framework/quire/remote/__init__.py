"""The engine in a child process: messages, the child's loop, and the engine as the parent sees it."""
