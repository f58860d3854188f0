//! A block device of several queues, with a blocking form.

use alloc::collections::VecDeque;
use alloc::vec;
use alloc::vec::Vec;
use core::fmt;

use gnttab_abi::GrantRef;

use super::frontend::{
    Completion, Data, DeviceBroken, DeviceProperties, FrontendQueue, Io, IoError, OpenError, RejectReason,
    Rejected,
};
use crate::grants::{Granter, Notify};

/// The token of operations that the blocking form submits; not for callers.
const BLOCKING: u64 = u64::MAX;

/// The queues of one device, driven from one thread.
///
/// The polling form is [`submit`](Self::submit), [`kick`](Self::kick), [`poll`](Self::poll), with any number of
/// operations in flight. The blocking form ([`read`](Self::read), [`write`](Self::write) and so on) does one at a
/// time and is told how to wait. To give each queue a thread of its own use [`FrontendQueue`] itself.
///
/// ```
/// use gnttab_io::fake::{Rig, RigConfig};
///
/// let mut rig = Rig::new(RigConfig::default(), 1024);
/// let (device, mut wait) = rig.split();
/// device.write(8, &[7; 1024], &mut wait)?;
/// device.flush(&mut wait)?;
/// let mut back = [0; 512];
/// device.read(9, &mut back, &mut wait)?;
/// assert_eq!(back, [7; 512]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct BlockDevice<G: Granter, N> {
    queues: Vec<FrontendQueue<G, N>>,
    /// Queues of the current connection, or of the last one: the others hold nothing.
    active: usize,
    /// Where polling goes on, so that no queue waits for another.
    turn: usize,
    /// Completions that a blocking call met while it waited for its own.
    aside: VecDeque<Completion>,
}

impl<G: Granter, N> fmt::Debug for BlockDevice<G, N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.queues).finish()
    }
}

/// Why a blocking operation failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BlockingError {
    /// It was not accepted.
    #[error(transparent)]
    Rejected(#[from] RejectReason),
    /// It failed.
    #[error(transparent)]
    Io(#[from] IoError),
    /// The backend broke the protocol. The operation may have been done or not.
    #[error(transparent)]
    Broken(#[from] DeviceBroken),
    /// The caller would wait no longer. The operation may have been done, or may still be.
    #[error("nobody waits for the backend any more")]
    GaveUp,
}

impl<G: Granter, N: Notify> BlockDevice<G, N> {
    /// A device of these queues, one at least, none of them open.
    ///
    /// # Panics
    /// If there is no queue.
    #[must_use]
    pub fn new(queues: Vec<FrontendQueue<G, N>>) -> Self {
        assert!(!queues.is_empty(), "a block device needs a queue");
        BlockDevice {
            queues,
            active: 1,
            turn: 0,
            aside: VecDeque::new(),
        }
    }

    /// Opens as many queues as there are ports, with rings of `ring_pages` pages: each queue's references.
    /// What an earlier connection left in queues beyond those moves to the first.
    ///
    /// # Errors
    /// [`OpenError`]; all queues are closed then.
    ///
    /// # Panics
    /// If there is no port, or there are more than queues.
    pub fn open(&mut self, ring_pages: usize, ports: Vec<N>) -> Result<Vec<Vec<GrantRef>>, OpenError> {
        assert!(
            (1..=self.queues.len()).contains(&ports.len()),
            "one port for each queue that is used"
        );
        if self.queues.iter().any(FrontendQueue::is_open) {
            return Err(OpenError::AlreadyOpen);
        }
        self.active = ports.len();
        let (used, unused) = self.queues.split_at_mut(self.active);
        for queue in unused {
            for unfinished in queue.take_unfinished() {
                used[0].adopt(unfinished);
            }
        }
        let rings: Result<Vec<_>, _> = used
            .iter_mut()
            .zip(ports)
            .map(|(queue, port)| queue.open(ring_pages, port))
            .collect();
        if rings.is_err() {
            self.close();
        }
        rings
    }

    /// As [`FrontendQueue::start`], for all queues.
    pub fn start(&mut self, properties: DeviceProperties) {
        for queue in &mut self.queues {
            queue.start(properties);
        }
    }

    /// As [`FrontendQueue::close`], for all queues.
    pub fn close(&mut self) {
        for queue in &mut self.queues {
            queue.close();
        }
    }

    /// What the current connection, or the last one, said of the device.
    #[must_use]
    pub fn properties(&self) -> Option<DeviceProperties> {
        self.queues[0].properties()
    }

    /// The queues, those in use first.
    #[must_use]
    pub fn queues(&self) -> &[FrontendQueue<G, N>] {
        &self.queues
    }

    /// The queues, to change.
    pub fn queues_mut(&mut self) -> &mut [FrontendQueue<G, N>] {
        &mut self.queues
    }

    /// Operations accepted whose completion was not polled.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.aside.len() + self.queues.iter().map(FrontendQueue::in_flight).sum::<usize>()
    }

    /// As [`FrontendQueue::submit`], to the queue with the least to do. A flush covers writes of every queue.
    /// The token `u64::MAX` is taken.
    ///
    /// # Errors
    /// [`Rejected`], which brings the operation back.
    pub fn submit(&mut self, token: u64, io: Io) -> Result<(), Rejected> {
        let used = self.queues[..self.active].iter_mut();
        match used.min_by_key(|queue| queue.in_flight()) {
            Some(queue) => queue.submit(token, io),
            None => Err(Rejected {
                io,
                reason: RejectReason::NeverConnected,
            }),
        }
    }

    /// As [`FrontendQueue::kick`], for all queues.
    pub fn kick(&mut self) {
        for queue in &mut self.queues {
            queue.kick();
        }
    }

    /// The next completion of any queue, in whatever order. `None`: nothing until the next event on one of
    /// the channels.
    ///
    /// # Errors
    /// [`DeviceBroken`] of any queue. The whole device must be closed then.
    pub fn poll(&mut self) -> Result<Option<Completion>, DeviceBroken> {
        match self.aside.pop_front() {
            Some(done) => Ok(Some(done)),
            None => self.poll_queues(),
        }
    }

    fn poll_queues(&mut self) -> Result<Option<Completion>, DeviceBroken> {
        for _ in 0..self.active {
            self.turn = (self.turn + 1) % self.active;
            let done = self.queues[self.turn].poll()?;
            if done.is_some() {
                return Ok(done);
            }
        }
        Ok(None)
    }

    /// Fills `into` from `sector` on. `wait` is called while there is nothing to do but wait for an event;
    /// it gives up by returning `false`.
    ///
    /// # Errors
    /// [`BlockingError`]; `into` is unchanged then.
    pub fn read(
        &mut self,
        sector: u64,
        into: &mut [u8],
        wait: &mut impl FnMut() -> bool,
    ) -> Result<(), BlockingError> {
        let io = self.run(
            Io::Read {
                sector,
                data: vec![0; into.len()].into(),
            },
            wait,
        )?;
        if let Io::Read {
            data: Data::Own(data),
            ..
        } = io
        {
            into.copy_from_slice(&data);
        }
        Ok(())
    }

    /// Writes `from` from `sector` on.
    ///
    /// # Errors
    /// [`BlockingError`]; parts may have been written.
    pub fn write(
        &mut self,
        sector: u64,
        from: &[u8],
        wait: &mut impl FnMut() -> bool,
    ) -> Result<(), BlockingError> {
        self.run(
            Io::Write {
                sector,
                data: from.to_vec().into(),
            },
            wait,
        )
        .map(drop)
    }

    /// Makes all completed writes durable.
    ///
    /// # Errors
    /// [`BlockingError`]: durability is not certain.
    pub fn flush(&mut self, wait: &mut impl FnMut() -> bool) -> Result<(), BlockingError> {
        self.run(Io::Flush, wait).map(drop)
    }

    /// Forgets `count` sectors from `sector` on.
    ///
    /// # Errors
    /// [`BlockingError`].
    pub fn discard(
        &mut self,
        sector: u64,
        count: u64,
        wait: &mut impl FnMut() -> bool,
    ) -> Result<(), BlockingError> {
        self.run(
            Io::Discard {
                sector,
                count,
                secure: false,
            },
            wait,
        )
        .map(drop)
    }

    fn run(&mut self, io: Io, wait: &mut impl FnMut() -> bool) -> Result<Io, BlockingError> {
        self.submit(BLOCKING, io).map_err(|rejected| rejected.reason)?;
        self.kick();
        let failure = loop {
            match self.poll_queues() {
                Ok(Some(done)) if done.token == BLOCKING => {
                    done.result?;
                    return Ok(done.io);
                }
                Ok(Some(done)) => self.aside.push_back(done),
                Ok(None) if wait() => {}
                Ok(None) => break BlockingError::GaveUp,
                Err(broken) => break broken.into(),
            }
        };
        for queue in &mut self.queues {
            queue.withdraw(BLOCKING);
        }
        Err(failure)
    }
}
