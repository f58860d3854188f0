//! Byte layouts and constants of Xen's grant-table interface, for x86_64, x86_32 and Arm.
