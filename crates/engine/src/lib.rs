//! The hypervisor's half of Xen's grant tables, for any hypervisor or VMM to embed.
