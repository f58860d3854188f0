//! A XenStore: tree, permissions, watches, transactions, quotas and wire protocol.
