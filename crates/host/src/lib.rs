//! Grant tables on plain Linux: a monitor, and domains that are processes.
