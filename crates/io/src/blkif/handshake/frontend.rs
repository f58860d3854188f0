//! The frontend's side of the handshake.

use alloc::format;
use alloc::string::{String, ToString};

use gnttab_abi::{Abi, DomId};

use super::keys::{self, BackendLimits, QueueOffer};
use crate::blkif::frontend::DeviceProperties;
use crate::xenbus::{
    Store, StoreExt, Tx, XenbusError, XenbusState, is_online, read_state, report_error, switch_state,
    write_state,
};

/// What a frontend is to do now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FrontendEvent {
    /// Nothing, until a watch fires.
    Idle,
    /// Open rings within these limits, with event channels, all for [`FrontendHandshake::backend_id`], then call
    /// [`FrontendHandshake::publish`].
    Setup(BackendLimits),
    /// Start the device, then call [`FrontendHandshake::connected`].
    Connect(DeviceProperties),
    /// The disk has changed its size: nothing to answer.
    Update(DeviceProperties),
    /// Close the device, then call [`FrontendHandshake::closed`].
    Disconnect,
    /// The device is no more. Nothing is granted any more.
    Removed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// State 1: the backend has to say its limits.
    Initialising,
    /// The driver was told to set up and has not answered.
    SettingUp,
    /// State 3: the backend has to connect.
    Published,
    /// The driver was told to connect and has not answered.
    Connecting,
    /// State 4.
    Connected,
    /// State 5, by our own wish or to undo an earlier driver's work: the backend has to agree.
    Closing,
    /// State 6, and nothing is sent any more, but what is granted stays so until the backend has unmapped it.
    Leaving,
    /// The driver was told to disconnect and has not answered.
    Stopping,
    /// State 6.
    Closed,
    Removed,
}

/// The frontend's side of one block device's handshake. See the [module](super).
///
/// It comes back by itself: when a backend closes after it was connected and its device stays online, or when
/// the toolstack puts another backend in its place, a new [`FrontendEvent::Setup`] follows. A backend of the same
/// domain that takes the rings over where a dead one left them is not even noticed.
#[derive(Debug)]
pub struct FrontendHandshake {
    directory: String,
    backend: String,
    backend_id: DomId,
    persistent: bool,
    phase: Phase,
    /// A connection to this backend was tried already: its Connected may be an old one.
    tried: bool,
    /// It was connected since, so that coming back by itself cannot go on for ever without any use.
    was_connected: bool,
    /// [`FrontendHandshake::close`] was called: no coming back.
    leaving: bool,
    /// What the connected backend said last.
    properties: Option<DeviceProperties>,
}

impl FrontendHandshake {
    /// Takes up a device whose directory the toolstack made, and watches its backend. `persistent`: whether we
    /// want persistent grants. A device that an earlier driver of this domain left in use is closed first: its
    /// first event is [`FrontendEvent::Disconnect`] then (spec 6.3).
    ///
    /// # Errors
    /// [`XenbusError`] if the directory lacks a key, or the store fails.
    pub fn probe<S: Store>(
        store: &mut S,
        directory: &str,
        persistent: bool,
    ) -> Result<FrontendHandshake, XenbusError<S::Error>> {
        let (backend, backend_id) = read_backend(store, directory)?;
        let fresh = matches!(
            read_state(store, directory)?,
            XenbusState::Initialising | XenbusState::Unknown
        );
        let this = FrontendHandshake {
            directory: directory.to_string(),
            backend,
            backend_id,
            persistent,
            phase: if fresh {
                Phase::Initialising
            } else {
                Phase::Closing
            },
            tried: !fresh,
            was_connected: !fresh,
            leaving: false,
            properties: None,
        };
        if !fresh {
            switch_state(store, directory, XenbusState::Closing)?;
        }
        store.watch(&this.watched_here()).map_err(XenbusError::Store)?;
        store.watch(&this.watched_there()).map_err(XenbusError::Store)?;
        Ok(this)
    }

    /// The device's directory.
    #[must_use]
    pub fn directory(&self) -> &str {
        &self.directory
    }

    /// The backend's domain: the one to grant to.
    #[must_use]
    pub fn backend_id(&self) -> DomId {
        self.backend_id
    }

    fn watched_here(&self) -> String {
        format!("{}/backend-id", self.directory)
    }

    fn watched_there(&self) -> String {
        format!("{}/state", self.backend)
    }

    /// Looks at the store and says what to do. May be called at any time.
    ///
    /// # Errors
    /// [`XenbusError`] if the store fails; call it again then. What the backend wrote is never an error
    /// here: keys that make no sense are reported in the store and end the connection.
    pub fn advance<S: Store>(&mut self, store: &mut S) -> Result<FrontendEvent, XenbusError<S::Error>> {
        use XenbusState::{Closed, Closing, Connected, InitWait, Initialised, Unknown};
        let own = read_state(store, &self.directory)?;
        let gone = own == Unknown;
        let moved = !gone && (self.was_reset(own) || self.has_another_backend(store)?);
        let backend = read_state(store, &self.backend)?;
        match self.phase {
            Phase::Removed => Ok(FrontendEvent::Removed),
            Phase::Stopping => Ok(FrontendEvent::Disconnect),
            Phase::Initialising | Phase::Closed if gone => self.forget(store),
            Phase::Initialising | Phase::Closed if moved && !self.leaving => {
                self.move_to_backend(store)?;
                Ok(FrontendEvent::Idle)
            }
            Phase::Initialising => match backend {
                InitWait => self.set_up(store),
                // It may skip a state, but not the one it still has from before.
                Initialised | Connected if !self.tried => self.set_up(store),
                _ => Ok(FrontendEvent::Idle),
            },
            Phase::Closed => self.advance_closed(store, backend),
            _ if gone || moved || matches!(backend, Unknown | Closed) => self.stop(),
            Phase::Leaving => Ok(FrontendEvent::Idle),
            _ if backend == Closing => {
                switch_state(store, &self.directory, Closed)?;
                self.phase = Phase::Leaving;
                Ok(FrontendEvent::Idle)
            }
            Phase::SettingUp => self.set_up(store),
            Phase::Published | Phase::Connecting if backend == Connected => self.read_properties(store),
            Phase::Connected if backend == Connected => self.look_for_changes(store),
            Phase::Published | Phase::Connecting | Phase::Connected | Phase::Closing => {
                Ok(FrontendEvent::Idle)
            }
        }
    }

    /// A backend that has closed but stays online will wait for us (spec 2.8).
    fn advance_closed<S: Store>(
        &mut self,
        store: &mut S,
        backend: XenbusState,
    ) -> Result<FrontendEvent, XenbusError<S::Error>> {
        use XenbusState::{Closed, InitWait, Initialising};
        if self.leaving {
            // Somebody may have written it for us, who did not know.
            switch_state(store, &self.directory, Closed)?;
            return Ok(FrontendEvent::Idle);
        }
        if !self.was_connected {
            return Ok(FrontendEvent::Idle);
        }
        let online = is_online(store, &self.backend)?;
        if online && matches!(backend, Closed | InitWait | Initialising) {
            switch_state(store, &self.directory, Initialising)?;
            self.was_connected = false;
            self.phase = Phase::Initialising;
        }
        Ok(FrontendEvent::Idle)
    }

    /// The toolstack has put our state back: there is a new backend where the old one was.
    fn was_reset(&mut self, own: XenbusState) -> bool {
        let spoken = matches!(
            self.phase,
            Phase::Published | Phase::Connecting | Phase::Connected | Phase::Closing | Phase::Leaving
        );
        let reset = spoken && own == XenbusState::Initialising;
        self.was_connected |= reset;
        reset
    }

    fn has_another_backend<S: Store>(&self, store: &mut S) -> Result<bool, XenbusError<S::Error>> {
        match read_backend(store, &self.directory) {
            Ok((backend, backend_id)) => Ok(backend != self.backend || backend_id != self.backend_id),
            Err(XenbusError::Store(error)) => Err(XenbusError::Store(error)),
            // The toolstack is about to write it.
            Err(_) => Ok(false),
        }
    }

    fn move_to_backend<S: Store>(&mut self, store: &mut S) -> Result<(), XenbusError<S::Error>> {
        let (backend, backend_id) = read_backend(store, &self.directory)?;
        if backend != self.backend {
            store.unwatch(&self.watched_there()).map_err(XenbusError::Store)?;
        }
        self.backend = backend;
        self.backend_id = backend_id;
        self.tried = false;
        self.was_connected = false;
        store.watch(&self.watched_there()).map_err(XenbusError::Store)?;
        switch_state(store, &self.directory, XenbusState::Initialising)?;
        self.phase = Phase::Initialising;
        Ok(())
    }

    fn set_up<S: Store>(&mut self, store: &mut S) -> Result<FrontendEvent, XenbusError<S::Error>> {
        match keys::read_limits(store, &self.backend) {
            Ok(limits) => {
                self.phase = Phase::SettingUp;
                Ok(FrontendEvent::Setup(limits))
            }
            Err(error) => self.reject(store, error),
        }
    }

    fn read_properties<S: Store>(&mut self, store: &mut S) -> Result<FrontendEvent, XenbusError<S::Error>> {
        match keys::read_properties(store, &self.backend, self.persistent) {
            Ok(properties) => {
                self.phase = Phase::Connecting;
                self.properties = Some(properties);
                Ok(FrontendEvent::Connect(properties))
            }
            Err(error) => self.reject(store, error),
        }
    }

    fn look_for_changes<S: Store>(&mut self, store: &mut S) -> Result<FrontendEvent, XenbusError<S::Error>> {
        match keys::read_properties(store, &self.backend, self.persistent) {
            Ok(properties) if self.properties != Some(properties) => {
                self.properties = Some(properties);
                Ok(FrontendEvent::Update(properties))
            }
            Ok(_) => Ok(FrontendEvent::Idle),
            Err(error) => self.reject(store, error),
        }
    }

    /// The backend wrote nonsense: the store is told why, and the connection ends.
    fn reject<S: Store>(
        &mut self,
        store: &mut S,
        error: XenbusError<S::Error>,
    ) -> Result<FrontendEvent, XenbusError<S::Error>> {
        let why = match error {
            XenbusError::Missing { path } => format!("{path} is missing"),
            XenbusError::Invalid {
                path,
                value,
                expected,
            } => {
                format!("{path} is {value:?}, expected {expected}")
            }
            error => return Err(error),
        };
        report_error(store, &self.directory, &why)?;
        self.stop()
    }

    fn stop<E>(&mut self) -> Result<FrontendEvent, XenbusError<E>> {
        self.phase = Phase::Stopping;
        Ok(FrontendEvent::Disconnect)
    }

    fn forget<S: Store>(&mut self, store: &mut S) -> Result<FrontendEvent, XenbusError<S::Error>> {
        self.phase = Phase::Removed;
        for path in [self.watched_here(), self.watched_there()] {
            store.unwatch(&path).map_err(XenbusError::Store)?;
        }
        Ok(FrontendEvent::Removed)
    }

    /// The driver has opened its queues: says where, in one transaction, and goes to Initialised.
    ///
    /// # Errors
    /// [`XenbusError::OutOfTurn`] unless [`FrontendEvent::Setup`] was the last event, or the store's error.
    pub fn publish<S: Store>(
        &mut self,
        store: &mut S,
        abi: Abi,
        queues: &[QueueOffer],
    ) -> Result<(), XenbusError<S::Error>> {
        if self.phase != Phase::SettingUp {
            return Err(XenbusError::OutOfTurn);
        }
        let (directory, persistent) = (&self.directory, self.persistent);
        store.transaction(|store, tx| {
            keys::write_offer(store, tx, directory, abi, persistent, queues)?;
            write_state(store, tx, directory, XenbusState::Initialised)
        })?;
        self.tried = true;
        self.phase = Phase::Published;
        Ok(())
    }

    /// The driver has started the device: goes to Connected.
    ///
    /// # Errors
    /// [`XenbusError::OutOfTurn`] unless [`FrontendEvent::Connect`] was the last event, or the store's error.
    pub fn connected<S: Store>(&mut self, store: &mut S) -> Result<(), XenbusError<S::Error>> {
        if self.phase != Phase::Connecting {
            return Err(XenbusError::OutOfTurn);
        }
        switch_state(store, &self.directory, XenbusState::Connected)?;
        self.was_connected = true;
        self.phase = Phase::Connected;
        Ok(())
    }

    /// The backend broke the protocol, or the driver could not set up: leaves the reason in the store. The
    /// next event is [`FrontendEvent::Disconnect`].
    ///
    /// # Errors
    /// The store's error.
    pub fn fail<S: Store>(&mut self, store: &mut S, why: &str) -> Result<(), XenbusError<S::Error>> {
        self.phase = Phase::Stopping;
        report_error(store, &self.directory, why)?;
        switch_state(store, &self.directory, XenbusState::Closing)
    }

    /// We want to leave: asks the backend to close. [`FrontendEvent::Disconnect`] follows when it has unmapped
    /// everything.
    ///
    /// # Errors
    /// The store's error.
    pub fn close<S: Store>(&mut self, store: &mut S) -> Result<(), XenbusError<S::Error>> {
        self.leaving = true;
        match self.phase {
            Phase::Removed | Phase::Stopping | Phase::Leaving | Phase::Closed => Ok(()),
            Phase::Initialising => {
                self.phase = Phase::Closed;
                switch_state(store, &self.directory, XenbusState::Closed)
            }
            _ => {
                self.phase = Phase::Closing;
                switch_state(store, &self.directory, XenbusState::Closing)
            }
        }
    }

    /// The driver has closed its queues: the connection is over.
    ///
    /// # Errors
    /// [`XenbusError::OutOfTurn`] unless [`FrontendEvent::Disconnect`] was the last event, or the store's error.
    pub fn closed<S: Store>(&mut self, store: &mut S) -> Result<(), XenbusError<S::Error>> {
        if self.phase != Phase::Stopping {
            return Err(XenbusError::OutOfTurn);
        }
        self.properties = None;
        switch_state(store, &self.directory, XenbusState::Closed)?;
        self.phase = Phase::Closed;
        Ok(())
    }
}

fn read_backend<S: Store>(store: &mut S, directory: &str) -> Result<(String, DomId), XenbusError<S::Error>> {
    let backend = store
        .text(Tx::NONE, directory, "backend")?
        .ok_or_else(|| XenbusError::Missing {
            path: format!("{directory}/backend"),
        })?;
    Ok((backend, DomId(store.required(Tx::NONE, directory, "backend-id")?)))
}
