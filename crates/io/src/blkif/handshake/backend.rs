//! The backend's side of the handshake.

use alloc::format;
use alloc::string::{String, ToString};

use gnttab_abi::DomId;

use super::keys::{self, BackendLimits, FrontendOffer};
use crate::blkif::disk::DiskInfo;
use crate::xenbus::{
    Store, StoreExt, Tx, XenbusError, XenbusState, is_online, read_state, report_error, switch_state,
    write_state,
};

/// What a backend is to do now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BackendEvent {
    /// Nothing, until a watch fires.
    Idle,
    /// Map the rings, bind the event channels, begin to serve, then call [`BackendHandshake::connected`]; or, if
    /// that cannot be done, [`BackendHandshake::fail`].
    Connect(FrontendOffer),
    /// Stop serving, unmap everything, unbind, then call [`BackendHandshake::closed`].
    Disconnect,
    /// The device is no more: forget it. Nothing is mapped any more.
    Removed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// State 2: the frontend has to speak.
    Waiting,
    /// The driver was told to connect and has not answered.
    Connecting,
    /// State 4.
    Connected,
    /// The driver was told to disconnect and has not answered.
    Stopping,
    /// State 6.
    Closed,
    Removed,
}

/// The backend's side of one block device's handshake. See the [module](super).
#[derive(Debug)]
pub struct BackendHandshake {
    directory: String,
    frontend: String,
    frontend_id: DomId,
    limits: BackendLimits,
    phase: Phase,
}

impl BackendHandshake {
    /// Takes up a device whose directory the toolstack made: watches its frontend, says what is allowed,
    /// goes to InitWait. A frontend that is connected already, to a backend of this domain that died, will be
    /// taken up where it stands.
    ///
    /// # Errors
    /// [`XenbusError`] if the directory lacks a key, or the store fails.
    pub fn probe<S: Store>(
        store: &mut S,
        directory: &str,
        limits: BackendLimits,
    ) -> Result<BackendHandshake, XenbusError<S::Error>> {
        let frontend = store
            .text(Tx::NONE, directory, "frontend")?
            .ok_or_else(|| XenbusError::Missing {
                path: format!("{directory}/frontend"),
            })?;
        let frontend_id = DomId(store.required(Tx::NONE, directory, "frontend-id")?);
        let mut this = BackendHandshake {
            directory: directory.to_string(),
            frontend,
            frontend_id,
            limits,
            phase: Phase::Waiting,
        };
        this.begin(store)?;
        for path in this.watched() {
            store.watch(&path).map_err(XenbusError::Store)?;
        }
        Ok(this)
    }

    /// The device's directory.
    #[must_use]
    pub fn directory(&self) -> &str {
        &self.directory
    }

    /// The frontend's domain: the one whose references are mapped.
    #[must_use]
    pub fn frontend_id(&self) -> DomId {
        self.frontend_id
    }

    /// The nodes whose changes call for [`BackendHandshake::advance`].
    #[must_use]
    pub fn watched(&self) -> [String; 2] {
        [
            format!("{}/state", self.frontend),
            format!("{}/online", self.directory),
        ]
    }

    fn begin<S: Store>(&mut self, store: &mut S) -> Result<(), XenbusError<S::Error>> {
        let (directory, limits) = (&self.directory, &self.limits);
        store.transaction(|store, tx| {
            keys::write_limits(store, tx, directory, limits)?;
            write_state(store, tx, directory, XenbusState::InitWait)
        })?;
        self.phase = Phase::Waiting;
        Ok(())
    }

    /// Looks at the store and says what to do. May be called at any time.
    ///
    /// # Errors
    /// [`XenbusError`] if the store fails; call it again then. What the frontend wrote is never an error
    /// here: keys that make no sense are reported in the store and end the connection.
    pub fn advance<S: Store>(&mut self, store: &mut S) -> Result<BackendEvent, XenbusError<S::Error>> {
        use XenbusState::{Closed, Closing, Connected, Initialised, Initialising, Unknown};
        let frontend = read_state(store, &self.frontend)?;
        let own = read_state(store, &self.directory)?;
        match self.phase {
            Phase::Removed => Ok(BackendEvent::Removed),
            Phase::Stopping => Ok(BackendEvent::Disconnect),
            Phase::Waiting | Phase::Closed if own == Unknown || frontend == Unknown => self.forget(store),
            Phase::Waiting => match frontend {
                Initialised | Connected => self.read_offer(store),
                Closing | Closed => {
                    self.finish(store)?;
                    self.advance_closed(store, frontend)
                }
                _ => Ok(BackendEvent::Idle),
            },
            Phase::Connecting | Phase::Connected => match frontend {
                _ if own == Unknown => self.stop(),
                // It restarted without a word.
                Closed | Unknown | Initialising => self.stop(),
                Closing => {
                    switch_state(store, &self.directory, Closing)?;
                    Ok(BackendEvent::Idle)
                }
                _ if self.phase == Phase::Connecting => self.read_offer(store),
                _ => Ok(BackendEvent::Idle),
            },
            Phase::Closed => self.advance_closed(store, frontend),
        }
    }

    fn advance_closed<S: Store>(
        &mut self,
        store: &mut S,
        frontend: XenbusState,
    ) -> Result<BackendEvent, XenbusError<S::Error>> {
        if !is_online(store, &self.directory)? {
            return self.forget(store);
        }
        if frontend == XenbusState::Initialising {
            self.begin(store)?;
        }
        Ok(BackendEvent::Idle)
    }

    fn read_offer<S: Store>(&mut self, store: &mut S) -> Result<BackendEvent, XenbusError<S::Error>> {
        match keys::read_offer(store, &self.frontend, &self.limits) {
            Ok(offer) => {
                self.phase = Phase::Connecting;
                Ok(BackendEvent::Connect(offer))
            }
            Err(XenbusError::Missing { path }) => self.reject(store, &format!("{path} is missing")),
            Err(XenbusError::Invalid {
                path,
                value,
                expected,
            }) => self.reject(store, &format!("{path} is {value:?}, expected {expected}")),
            Err(error) => Err(error),
        }
    }

    fn reject<S: Store>(&mut self, store: &mut S, why: &str) -> Result<BackendEvent, XenbusError<S::Error>> {
        self.end_with(store, why)?;
        self.stop()
    }

    fn end_with<S: Store>(&mut self, store: &mut S, why: &str) -> Result<(), XenbusError<S::Error>> {
        report_error(store, &self.directory, why)?;
        // The frontend answers Closing with Closed, and may come again if the device stays online.
        switch_state(store, &self.directory, XenbusState::Closing)
    }

    fn stop<E>(&mut self) -> Result<BackendEvent, XenbusError<E>> {
        self.phase = Phase::Stopping;
        Ok(BackendEvent::Disconnect)
    }

    fn finish<S: Store>(&mut self, store: &mut S) -> Result<(), XenbusError<S::Error>> {
        switch_state(store, &self.directory, XenbusState::Closed)?;
        self.phase = Phase::Closed;
        Ok(())
    }

    fn forget<S: Store>(&mut self, store: &mut S) -> Result<BackendEvent, XenbusError<S::Error>> {
        switch_state(store, &self.directory, XenbusState::Closed)?;
        self.phase = Phase::Removed;
        for path in self.watched() {
            store.unwatch(&path).map_err(XenbusError::Store)?;
        }
        Ok(BackendEvent::Removed)
    }

    /// The driver serves the rings: says what the disk is and goes to Connected.
    ///
    /// # Errors
    /// [`XenbusError::OutOfTurn`] unless [`BackendEvent::Connect`] was the last event, or the store's error.
    pub fn connected<S: Store>(
        &mut self,
        store: &mut S,
        disk: &DiskInfo,
    ) -> Result<(), XenbusError<S::Error>> {
        if self.phase != Phase::Connecting {
            return Err(XenbusError::OutOfTurn);
        }
        let directory = &self.directory;
        store.transaction(|store, tx| {
            keys::write_properties(store, tx, directory, disk)?;
            write_state(store, tx, directory, XenbusState::Connected)
        })?;
        self.phase = Phase::Connected;
        Ok(())
    }

    /// The driver could not connect, or its ring broke: leaves the reason in the store and asks the frontend
    /// to close. The next event is [`BackendEvent::Disconnect`].
    ///
    /// # Errors
    /// The store's error.
    pub fn fail<S: Store>(&mut self, store: &mut S, why: &str) -> Result<(), XenbusError<S::Error>> {
        self.phase = Phase::Stopping;
        self.end_with(store, why)
    }

    /// The disk has another size: says so (spec 2.7).
    ///
    /// # Errors
    /// [`XenbusError::OutOfTurn`] unless connected, or the store's error.
    pub fn resized<S: Store>(&mut self, store: &mut S, disk: &DiskInfo) -> Result<(), XenbusError<S::Error>> {
        if self.phase != Phase::Connected {
            return Err(XenbusError::OutOfTurn);
        }
        let directory = &self.directory;
        store.transaction(|store, tx| {
            keys::write_size(store, tx, directory, disk)?;
            // Written although it stands there: the event is the message.
            store.put(tx, directory, "state", XenbusState::Connected)
        })
    }

    /// The driver has unmapped everything: goes to Closed, after which the frontend frees its pages.
    ///
    /// # Errors
    /// [`XenbusError::OutOfTurn`] unless [`BackendEvent::Disconnect`] was the last event, or the store's error.
    pub fn closed<S: Store>(&mut self, store: &mut S) -> Result<(), XenbusError<S::Error>> {
        if self.phase != Phase::Stopping {
            return Err(XenbusError::OutOfTurn);
        }
        self.finish(store)
    }
}
