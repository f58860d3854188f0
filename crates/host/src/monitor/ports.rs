//! Event channels: who may take the other end of which.
//!
//! A domain makes a port for another domain and gets its own end at once; the monitor keeps the other end
//! until that domain asks for it. From then on the two are by themselves: the monitor holds no end, and
//! each sees the other's death as a hang-up.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use gnttab_abi::{DomId, Errno};

use crate::sys::EventPort;

/// Ports that one domain may have.
const MOST_PORTS: usize = 1024;

/// The ports of one domain.
#[derive(Debug, Default)]
pub(crate) struct Ports(Mutex<BTreeMap<u32, Port>>);

#[derive(Debug)]
enum Port {
    /// Made for a domain that has not taken it: the end that is meant for it.
    Waiting(DomId, EventPort),
    /// Connected; the descriptors are with the domains.
    Connected(DomId, u32),
}

impl Ports {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, Port>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a port for `peer`; `send` gives its number and the own end to the domain.
    pub(crate) fn make(
        &self,
        peer: DomId,
        send: impl FnOnce(u32, &EventPort) -> Result<(), Errno>,
    ) -> Result<u32, Errno> {
        let mut ports = self.lock();
        let number = free_number(&ports)?;
        let (own, other) = EventPort::pair().map_err(|_| Errno::NoMem)?;
        send(number, &own)?;
        ports.insert(number, Port::Waiting(peer, other));
        Ok(number)
    }

    /// The end of port `number` that waits for `caller`.
    fn take_waiting(&self, number: u32, caller: DomId) -> Result<EventPort, Errno> {
        let mut ports = self.lock();
        match ports.remove(&number) {
            Some(Port::Waiting(peer, end)) if peer == caller => Ok(end),
            Some(other) => {
                ports.insert(number, other);
                Err(Errno::Inval)
            }
            None => Err(Errno::Inval),
        }
    }

    /// Takes the other end of `peer`'s port `remote`; `send` gives it and its new number to the domain.
    pub(crate) fn bind(
        &self,
        caller: DomId,
        (peer, peers): (DomId, &Ports),
        remote: u32,
        send: impl FnOnce(u32, &EventPort) -> Result<(), Errno>,
    ) -> Result<u32, Errno> {
        // One lock at a time: two domains may bind to each other at once.
        let end = peers.take_waiting(remote, caller)?;
        let bound = {
            let mut ports = self.lock();
            free_number(&ports).and_then(|number| {
                send(number, &end)?;
                ports.insert(number, Port::Connected(peer, remote));
                Ok(number)
            })
        };
        let port = match bound {
            Ok(number) => Port::Connected(caller, number),
            Err(_) => Port::Waiting(caller, end),
        };
        peers.lock().insert(remote, port);
        bound
    }

    /// Gives a port up.
    pub(crate) fn close(&self, number: u32) -> Result<(), Errno> {
        self.lock().remove(&number).map(drop).ok_or(Errno::Inval)
    }

    /// Gives all ports up.
    pub(crate) fn close_all(&self) {
        self.lock().clear();
    }

    /// Ports by number: the peer, and its port if it has taken the other end.
    pub(crate) fn view(&self) -> Vec<(u32, DomId, Option<u32>)> {
        let ports = self.lock();
        let view = ports.iter().map(|(number, port)| match port {
            Port::Waiting(peer, _) => (*number, *peer, None),
            Port::Connected(peer, remote) => (*number, *peer, Some(*remote)),
        });
        view.collect()
    }
}

/// The lowest number from 1 that is free.
fn free_number(ports: &BTreeMap<u32, Port>) -> Result<u32, Errno> {
    if ports.len() >= MOST_PORTS {
        return Err(Errno::NoMem);
    }
    (1..)
        .find(|number| !ports.contains_key(number))
        .ok_or(Errno::NoMem)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: DomId = DomId(1);
    const TWO: DomId = DomId(2);

    fn keep(slot: &mut Option<EventPort>) -> impl FnMut(u32, &EventPort) -> Result<(), Errno> + '_ {
        |_, end| {
            let [incoming, outgoing] = end.descriptors();
            let own = |fd: std::os::fd::BorrowedFd<'_>| fd.try_clone_to_owned().unwrap();
            *slot = Some(EventPort::from_descriptors(own(incoming), own(outgoing)));
            Ok(())
        }
    }

    #[test]
    fn the_two_ends_of_a_channel_meet() {
        let (one, two) = (Ports::default(), Ports::default());
        let (mut left, mut right) = (None, None);
        let port = one.make(TWO, keep(&mut left)).unwrap();
        left.as_ref().unwrap().send().unwrap();
        let other = two.bind(TWO, (ONE, &one), port, keep(&mut right)).unwrap();
        assert!(
            right.as_ref().unwrap().take().unwrap(),
            "what was sent before is not lost"
        );
        assert_eq!(one.view(), [(port, TWO, Some(other))]);
        assert_eq!(two.view(), [(other, ONE, Some(port))]);
        drop(left);
        assert!(right.unwrap().take().is_err(), "the monitor holds no end");
    }

    #[test]
    fn an_end_is_for_the_domain_it_was_made_for_and_once() {
        let (one, two, three) = (Ports::default(), Ports::default(), Ports::default());
        let sent = |_: u32, _: &EventPort| Ok(());
        let port = one.make(TWO, sent).unwrap();
        assert_eq!(three.bind(DomId(3), (ONE, &one), port, sent), Err(Errno::Inval));
        assert_eq!(two.bind(TWO, (ONE, &one), port + 1, sent), Err(Errno::Inval));
        two.bind(TWO, (ONE, &one), port, sent).unwrap();
        assert_eq!(two.bind(TWO, (ONE, &one), port, sent), Err(Errno::Inval));
        one.close(port).unwrap();
        assert_eq!(one.close(port), Err(Errno::Inval));
    }

    #[test]
    fn an_end_that_could_not_be_sent_can_be_taken_later() {
        let (one, two) = (Ports::default(), Ports::default());
        let port = one.make(TWO, |_, _| Ok(())).unwrap();
        assert_eq!(
            two.bind(TWO, (ONE, &one), port, |_, _| Err(Errno::Again)),
            Err(Errno::Again)
        );
        assert_eq!(two.view(), []);
        assert!(two.bind(TWO, (ONE, &one), port, |_, _| Ok(())).is_ok());
    }

    #[test]
    fn ports_are_bounded() {
        let ports = Ports::default();
        for _ in 0..MOST_PORTS {
            ports.make(TWO, |_, _| Ok(())).unwrap();
        }
        assert_eq!(ports.make(TWO, |_, _| Ok(())), Err(Errno::NoMem));
        ports.close(7).unwrap();
        assert_eq!(ports.make(TWO, |_, _| Ok(())), Ok(7));
    }
}
