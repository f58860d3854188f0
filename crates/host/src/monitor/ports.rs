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
    /// Ports ever entered: the serial of the last one.
    entered: u64,
}

/// A port. Its number is used until it is closed, whatever its state.
#[derive(Debug)]
struct Port {
    /// Tells it from one that is made with its number after it is closed.
    serial: u64,
    peer: DomId,
    state: State,
    #[expect(dead_code, reason = "open is all that it has to be")]
    sending: Sending,
}

#[derive(Debug)]
enum State {
    /// Made for a domain that has not taken it: the end that is meant for it.
    Waiting(EventPort),
    /// Its end is on the way to the peer, and comes back if it cannot be sent.
    Taken,
    /// Connected with this port of the peer.
    Connected(u32),
}

/// A copy of what the port's domain sends through: the peer sees a hang-up when this too is closed.
type Sending = OwnedFd;

impl List {
    /// The lowest number from 1 that is free.
    fn free_number(&self) -> Result<u32, Errno> {
        if self.ports.len() >= MOST_PORTS {
            return Err(Errno::NoMem);
        }
        (1..)
            .find(|number| !self.ports.contains_key(number))
            .ok_or(Errno::NoMem)
    }

    /// Enters a port under a free number; its serial.
    fn enter(&mut self, number: u32, peer: DomId, state: State, sending: Sending) -> u64 {
        self.entered += 1;
        let serial = self.entered;
        let port = Port {
            serial,
            peer,
            state,
            sending,
        };
        self.ports.insert(number, port);
        serial
    }
}

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
        let number = list.free_number()?;
        let (own, other) = EventPort::pair().map_err(|_| Errno::NoMem)?;
        send(number, &own)?;
        list.enter(number, peer, State::Waiting(other), own.into_sending());
        Ok(number)
    }

    /// The end that port `number` keeps for `caller`, and the port's serial. The port is to be settled.
    fn take_waiting(&self, number: u32, caller: DomId) -> Result<(EventPort, u64), Errno> {
        let mut list = self.lock();
        let port = list.ports.get_mut(&number).filter(|port| port.peer == caller);
        let port = port.ok_or(Errno::Inval)?;
        match std::mem::replace(&mut port.state, State::Taken) {
            State::Waiting(end) => Ok((end, port.serial)),
            other => {
                port.state = other;
                Err(Errno::Inval)
            }
        }
    }

    /// Takes the other end of `peer`'s port `remote`; `send` gives it and its new number to the domain.
    ///
    /// `peer` may close that port meanwhile: then this fails, and an end that was sent is hung up.
    pub(crate) fn bind(
        &self,
        caller: DomId,
        (peer, peers): (DomId, &Ports),
        remote: u32,
        send: impl FnOnce(u32, &EventPort) -> Result<(), Errno>,
    ) -> Result<u32, Errno> {
        // One lock at a time: two domains may bind to each other at once.
        let (end, taken) = peers.take_waiting(remote, caller)?;
        let mut list = self.lock();
        let sent = list
            .free_number()
            .and_then(|number| send(number, &end).map(|()| number));
        let number = match sent {
            Ok(number) => number,
            Err(errno) => {
                drop(list);
                peers.settle(remote, taken, State::Waiting(end));
                return Err(errno);
            }
        };
        let own = list.enter(number, peer, State::Connected(remote), end.into_sending());
        drop(list);
        if peers.settle(remote, taken, State::Connected(number)) {
            return Ok(number);
        }
        self.remove(number, own);
        Err(Errno::Inval)
    }

    /// Says what became of a port that was taken from; false if it was closed meanwhile.
    fn settle(&self, number: u32, serial: u64, state: State) -> bool {
        let mut list = self.lock();
        let port = list.ports.get_mut(&number).filter(|port| port.serial == serial);
        port.map(|port| port.state = state).is_some()
    }

    /// Gives up the port `number` if it still is the one with this serial.
    fn remove(&self, number: u32, serial: u64) {
        let mut list = self.lock();
        if list.ports.get(&number).is_some_and(|port| port.serial == serial) {
            list.ports.remove(&number);
        }
    }

    /// Gives a port up.
    pub(crate) fn close(&self, number: u32) -> Result<(), Errno> {
        self.lock().ports.remove(&number).map(drop).ok_or(Errno::Inval)
    }

    /// Gives all ports up.
    pub(crate) fn close_all(&self) {
        let ports = std::mem::take(&mut self.lock().ports);
        // Outside the lock: this closes.
        drop(ports);
    }

    /// Ports by number: the peer, and its port if it has taken the other end.
    pub(crate) fn view(&self) -> Vec<(u32, DomId, Option<u32>)> {
        let list = self.lock();
        let view = list.ports.iter().map(|(number, port)| match port.state {
            State::Waiting(_) | State::Taken => (*number, port.peer, None),
            State::Connected(remote) => (*number, port.peer, Some(remote)),
        });
        view.collect()
    }
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
        assert_eq!(bound, Err(Errno::Inval));
        assert_eq!((one.view(), two.view()), (vec![], vec![]));
    }

    #[test]
    fn a_port_made_while_another_is_taken_gets_a_number_of_its_own() {
        for answer in [Ok(()), Err(Errno::Again)] {
            let (one, two) = (Ports::default(), Ports::default());
            let port = one.make(TWO, |_, _| Ok(())).unwrap();
            let mut made = None;
            let bound = two.bind(TWO, (ONE, &one), port, |_, _| {
                made = Some(one.make(DomId(3), |_, _| Ok(()))?);
                answer
            });
            assert_eq!(bound.map(drop), answer);
            let made = made.unwrap();
            assert_ne!(made, port);
            assert_eq!(one.view(), [(port, TWO, bound.ok()), (made, DomId(3), None)]);
        }
    }

    #[test]
    fn a_port_closed_while_it_is_taken_stays_closed() {
        for answer in [Ok(()), Err(Errno::Again)] {
            let (one, two) = (Ports::default(), Ports::default());
            let port = one.make(TWO, |_, _| Ok(())).unwrap();
            let mut sent = None;
            let bound = two.bind(TWO, (ONE, &one), port, |number, end| {
                keep(&mut sent)(number, end)?;
                one.close(port)?;
                answer
            });
            assert_eq!(bound, answer.and(Err(Errno::Inval)));
            assert_eq!((one.view(), two.view()), (vec![], vec![]));
            assert_eq!(sent.unwrap().take(), Err(rustix::io::Errno::PIPE));
        }
    }

    #[test]
    fn a_port_made_with_the_number_of_one_closed_while_it_is_taken_is_another_port() {
        for answer in [Ok(()), Err(Errno::Again)] {
            let (one, two) = (Ports::default(), Ports::default());
            let port = one.make(TWO, |_, _| Ok(())).unwrap();
            let bound = two.bind(TWO, (ONE, &one), port, |_, _| {
                one.close(port)?;
                assert_eq!(one.make(DomId(3), |_, _| Ok(())), Ok(port));
                answer
            });
            assert!(bound.is_err());
            assert_eq!(one.view(), [(port, DomId(3), None)]);
            assert_eq!(two.view(), []);
        }
    }

    #[test]
    fn an_end_on_its_way_cannot_be_taken_a_second_time() {
        let (one, two, other) = (Ports::default(), Ports::default(), Ports::default());
        let port = one.make(TWO, |_, _| Ok(())).unwrap();
        let bound = two.bind(TWO, (ONE, &one), port, |_, _| {
            let again = other.bind(TWO, (ONE, &one), port, |_, _| Ok(()));
            assert_eq!(again, Err(Errno::Inval));
            Ok(())
        });
        assert!(bound.is_ok());
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
