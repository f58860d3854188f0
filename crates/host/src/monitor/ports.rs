//! Event channels: who may take the other end of which.
//!
//! A domain makes a port for another domain and gets its own end at once; the monitor keeps the other end
//! until that domain asks for it. From then on the two are by themselves, but for one thing: of each
//! domain's sending half the monitor holds a copy until the port is closed, by the domain or in its burial.
//! So a peer sees a hang-up not when the process dies but when everything that it had mapped was released,
//! and can then end all its grants.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use gnttab_abi::{DomId, Errno};

use crate::sys::EventPort;

/// Ports that one domain may have.
const MOST_PORTS: usize = 512;

/// The ports of one domain.
#[derive(Debug, Default)]
pub(crate) struct Ports(Mutex<List>);

#[derive(Debug, Default)]
struct List {
    ports: BTreeMap<u32, Port>,
    /// Its domain is dead.
    closed: bool,
}

#[derive(Debug)]
enum Port {
    /// Made for a domain that has not taken it: the end that is meant for it.
    Waiting(DomId, EventPort, Sending),
    /// Connected with the domain's port.
    Connected(
        DomId,
        u32,
        #[expect(dead_code, reason = "open is all that it has to be")] Sending,
    ),
}

/// A copy of what the port's domain sends through: the peer sees a hang-up when this too is closed.
type Sending = OwnedFd;

impl Ports {
    fn lock(&self) -> MutexGuard<'_, List> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a port for `peer`; `send` gives its number and the own end to the domain.
    pub(crate) fn make(
        &self,
        peer: DomId,
        send: impl FnOnce(u32, &EventPort) -> Result<(), Errno>,
    ) -> Result<u32, Errno> {
        let mut list = self.lock();
        let number = free_number(&list)?;
        let (own, other) = EventPort::pair().map_err(|_| Errno::NoMem)?;
        send(number, &own)?;
        list.ports
            .insert(number, Port::Waiting(peer, other, own.into_sending()));
        Ok(number)
    }

    /// What port `number` keeps for `caller`, taken out of the list.
    fn take_waiting(&self, number: u32, caller: DomId) -> Result<(EventPort, Sending), Errno> {
        let mut list = self.lock();
        match list.ports.remove(&number) {
            Some(Port::Waiting(peer, end, sending)) if peer == caller => Ok((end, sending)),
            Some(other) => {
                list.ports.insert(number, other);
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
        let (end, sending) = peers.take_waiting(remote, caller)?;
        let mut list = self.lock();
        let sent = free_number(&list).and_then(|number| send(number, &end).map(|()| number));
        let port = match sent {
            Ok(number) => {
                list.ports
                    .insert(number, Port::Connected(peer, remote, end.into_sending()));
                Port::Connected(caller, number, sending)
            }
            Err(_) => Port::Waiting(caller, end, sending),
        };
        drop(list);
        peers.put_back(remote, port);
        sent
    }

    /// Enters a port that was taken out, unless all were given up meanwhile.
    fn put_back(&self, number: u32, port: Port) {
        let mut list = self.lock();
        if !list.closed {
            list.ports.insert(number, port);
        }
    }

    /// Gives a port up.
    pub(crate) fn close(&self, number: u32) -> Result<(), Errno> {
        self.lock().ports.remove(&number).map(drop).ok_or(Errno::Inval)
    }

    /// Gives all ports up.
    pub(crate) fn close_all(&self) {
        let ports = {
            let mut list = self.lock();
            list.closed = true;
            std::mem::take(&mut list.ports)
        };
        // Outside the lock: this closes.
        drop(ports);
    }

    /// Ports by number: the peer, and its port if it has taken the other end.
    pub(crate) fn view(&self) -> Vec<(u32, DomId, Option<u32>)> {
        let list = self.lock();
        let view = list.ports.iter().map(|(number, port)| match port {
            Port::Waiting(peer, ..) => (*number, *peer, None),
            Port::Connected(peer, remote, _) => (*number, *peer, Some(*remote)),
        });
        view.collect()
    }
}

/// The lowest number from 1 that is free.
fn free_number(List { ports, .. }: &List) -> Result<u32, Errno> {
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
        let right = right.unwrap();
        assert_eq!(
            right.take(),
            Ok(false),
            "its process may be dead, but it is not buried"
        );
        one.close_all();
        assert_eq!(right.take(), Err(rustix::io::Errno::PIPE));
    }

    #[test]
    fn a_dead_domain_gets_no_port_back() {
        let (one, two) = (Ports::default(), Ports::default());
        let port = one.make(TWO, |_, _| Ok(())).unwrap();
        let bound = two.bind(TWO, (ONE, &one), port, |_, _| {
            one.close_all();
            Ok(())
        });
        assert!(bound.is_ok());
        assert_eq!(one.view(), []);
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
