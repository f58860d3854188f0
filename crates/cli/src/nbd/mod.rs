//! An NBD server: a disk as a network block device, on a Unix socket or on the loopback address.
//!
//! [`connection`] is the protocol without sockets, [`server`] the sockets and threads, [`listener`] the place where
//! clients come in, [`wire`] the numbers. The disk is anything that is a [`BlockDevice`](crate::block::BlockDevice).

pub(crate) mod connection;
pub(crate) mod listener;
pub(crate) mod server;
mod wire;

#[cfg(test)]
mod clients;
