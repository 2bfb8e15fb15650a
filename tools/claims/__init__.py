"""The claims of the LLaDA paper at a size that one CPU core trains: a command each, with a control and seeds."""
