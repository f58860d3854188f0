//! The guest's half of Xen's grant tables: allocate, grant, end, map.
