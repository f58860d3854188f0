//! What both sides of every split device do in the XenStore (spec 6): states, and a small store trait.
//!
//! # Rules
//! 1. Each side writes its own `state` only, and watches the other's.
//! 2. A watch may fire at any time, and values in between may be missed. So nothing here reacts to an event:
//!    a handshake is a value with an `advance` method that looks at the store and says what is to be done. It may
//!    be called at any time, as often as one likes.
//! 3. What the peer wrote is text from a stranger: parsed strictly, bounded, never trusted (PVR-5).
//!
//! The handshake of block devices is [`blkif::handshake`](crate::blkif::handshake).

mod store;

use alloc::format;
use alloc::string::String;

use core::fmt;

pub(crate) use store::invalid;
pub use store::{Store, StoreExt, Tx, XenbusError};

/// The state of one side of a device: the number in its `state` key (spec 6.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum XenbusState {
    /// No such key, or a number that is none of these.
    #[default]
    Unknown = 0,
    /// Just made.
    Initialising = 1,
    /// The backend has said what it can do.
    InitWait = 2,
    /// The frontend has said how it wants to talk.
    Initialised = 3,
    /// In use.
    Connected = 4,
    /// Asking to end, or agreeing to.
    Closing = 5,
    /// At an end: nothing is shared any more.
    Closed = 6,
    /// The frontend changes something while connected.
    Reconfiguring = 7,
    /// The backend has taken it over.
    Reconfigured = 8,
}

impl XenbusState {
    /// The state of a key's text.
    #[must_use]
    pub fn from_text(text: &[u8]) -> XenbusState {
        match text {
            b"1" => XenbusState::Initialising,
            b"2" => XenbusState::InitWait,
            b"3" => XenbusState::Initialised,
            b"4" => XenbusState::Connected,
            b"5" => XenbusState::Closing,
            b"6" => XenbusState::Closed,
            b"7" => XenbusState::Reconfiguring,
            b"8" => XenbusState::Reconfigured,
            _ => XenbusState::Unknown,
        }
    }

    /// Whether the peer uses the device no more: closing, closed, or gone.
    #[must_use]
    pub fn is_ending(self) -> bool {
        matches!(
            self,
            XenbusState::Closing | XenbusState::Closed | XenbusState::Unknown
        )
    }
}

impl fmt::Display for XenbusState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", *self as u8)
    }
}

/// The port of an event channel, as its owner numbers it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EventPort(pub u32);

impl fmt::Display for EventPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// The state that stands in a device's directory.
///
/// # Errors
/// [`XenbusError`] if the store fails.
pub fn read_state<S: Store>(store: &mut S, directory: &str) -> Result<XenbusState, XenbusError<S::Error>> {
    let text = store
        .read(Tx::NONE, &format!("{directory}/state"))
        .map_err(XenbusError::Store)?;
    Ok(text.map_or(XenbusState::Unknown, |text| XenbusState::from_text(&text)))
}

/// Writes a device's own state, unless it stands there already or the device was removed (spec 6.3).
///
/// # Errors
/// [`XenbusError`] if the store fails.
pub fn switch_state<S: Store>(
    store: &mut S,
    directory: &str,
    state: XenbusState,
) -> Result<(), XenbusError<S::Error>> {
    store.transaction(|store, tx| write_state(store, tx, directory, state))
}

/// As [`switch_state`], inside a transaction.
///
/// # Errors
/// [`XenbusError`] if the store fails.
pub fn write_state<S: Store>(
    store: &mut S,
    tx: Tx,
    directory: &str,
    state: XenbusState,
) -> Result<(), XenbusError<S::Error>> {
    let key = format!("{directory}/state");
    match store.read(tx, &key).map_err(XenbusError::Store)? {
        None => Ok(()),
        Some(now) if XenbusState::from_text(&now) == state => Ok(()),
        Some(_) => store.put(tx, directory, "state", state),
    }
}

/// Whether the toolstack means a backend's device to stay when its connection ends. What is no number is no yes.
///
/// # Errors
/// [`XenbusError`] if the store fails.
pub fn is_online<S: Store>(store: &mut S, backend: &str) -> Result<bool, XenbusError<S::Error>> {
    match store.flag(Tx::NONE, backend, "online") {
        Err(XenbusError::Invalid { .. }) => Ok(false),
        other => other,
    }
}

/// Leaves a message where an administrator looks for it: `error/...` in the domain's own directory.
///
/// # Errors
/// [`XenbusError`] if the store fails.
pub fn report_error<S: Store>(
    store: &mut S,
    directory: &str,
    message: &str,
) -> Result<(), XenbusError<S::Error>> {
    match error_path(directory) {
        Some(path) => store
            .write(Tx::NONE, &path, message.as_bytes())
            .map_err(XenbusError::Store),
        None => Ok(()),
    }
}

/// `/local/domain/<id>/<rest>` has its errors in `/local/domain/<id>/error/<rest>/error`.
fn error_path(directory: &str) -> Option<String> {
    let rest = directory.strip_prefix("/local/domain/")?;
    let (domain, device) = rest.split_once('/')?;
    Some(format!("/local/domain/{domain}/error/{device}/error"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::string::ToString;

    #[test]
    fn states_are_single_digits() {
        for number in 0..=9u8 {
            let state = XenbusState::from_text(number.to_string().as_bytes());
            assert_eq!(state as u8, if number <= 8 { number } else { 0 });
            assert_eq!(state.to_string(), (state as u8).to_string());
        }
        for text in ["", "04", " 4", "4 ", "44", "-4", "connected"] {
            assert_eq!(XenbusState::from_text(text.as_bytes()), XenbusState::Unknown);
        }
    }

    #[test]
    fn errors_have_their_place() {
        assert_eq!(
            error_path("/local/domain/7/device/vbd/51712").as_deref(),
            Some("/local/domain/7/error/device/vbd/51712/error")
        );
        assert_eq!(error_path("device/vbd/51712"), None);
    }
}
