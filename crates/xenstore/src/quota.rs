/// What an unprivileged domain may use up. The control domain is not limited,
/// but for `pending_events`.
///
/// ```
/// use gnttab_xenstore::{Quotas, Store};
///
/// let store = Store::new(Quotas { nodes: 50, ..Quotas::default() });
/// # let _ = store;
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Quotas {
    /// Nodes the domain owns. Past it: `ENOSPC`.
    pub nodes: usize,
    /// Bytes of one node: its value, 8 for each entry of its permissions, and
    /// the names of its children, each with its NUL. Past it: `ENOSPC`.
    pub node_size: usize,
    /// Entries in the permissions of one node, the owner's among them. Past
    /// it: `ENOSPC`.
    pub perms: usize,
    /// Watches of all connections of the domain. Past it: `E2BIG`.
    pub watches: usize,
    /// Open transactions of all connections of the domain. Past it: `ENOSPC`.
    pub transactions: usize,
    /// Nodes looked at, and changes made, in one transaction. Past it: `ENOSPC`.
    pub transaction_nodes: usize,
    /// Bytes of paths and values that all open transactions of the domain
    /// remember. Past it: `ENOSPC`.
    pub transaction_bytes: usize,
    /// Events that wait for one connection to take them. Past it nobody is
    /// told an error: a watch's events are merged into one, which names the
    /// watched path itself. So never more than this and the number of watches.
    pub pending_events: usize,
}

impl Default for Quotas {
    /// The limits of Xen's own store where it has them.
    fn default() -> Self {
        Quotas {
            nodes: 1000,
            node_size: 2048,
            perms: 5,
            watches: 128,
            transactions: 10,
            transaction_nodes: 1024,
            transaction_bytes: 1 << 20,
            pending_events: 1024,
        }
    }
}
