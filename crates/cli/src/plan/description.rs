//! What is to be planned: domains and devices, as TOML.
//!
//! A machine file of `gnttab run` is a description: what only running needs is skipped.

use gnttab_io::blkif::MAX_DIRECT_SEGMENTS;
use serde::Deserialize;
use serde::de::IgnoredAny;
use toml::Spanned;

use crate::machine::{Bounded, Name, Wrong};
use crate::roles::Sharing;

/// A working description, with every key explained.
pub(crate) const EXAMPLE: &str = include_str!("../../plan.toml");

/// Having one tells you: every name is there once, and every name that a device refers to is there.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Description {
    #[serde(default, rename = "domain")]
    pub(crate) domains: Vec<Domain>,
    #[serde(default, rename = "disk")]
    pub(crate) disks: Vec<Disk>,
    #[serde(default, rename = "network")]
    pub(crate) networks: Vec<Network>,
}

/// A domain.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Domain {
    pub(crate) name: Spanned<Name>,
    /// The version that its table will have.
    #[serde(default)]
    pub(crate) grant_version: Bounded<1, 2, 1>,
    #[serde(default)]
    pub(crate) grant_frames: Bounded<1, 1024, 64>,
    #[serde(default)]
    pub(crate) maptrack_frames: Bounded<1, 4096, 1024>,
    /// References beyond those of the devices.
    #[serde(default)]
    pub(crate) grants: Bounded<0, 0x10_0000, 0>,
    /// Mappings beyond those of the devices.
    #[serde(default)]
    pub(crate) mappings: Bounded<0, 0x10_0000, 0>,
    // What a machine file says beyond.
    #[serde(default, rename = "memory")]
    _memory: IgnoredAny,
    #[serde(default, rename = "vcpus")]
    _vcpus: IgnoredAny,
    #[serde(default, rename = "max-grant-version")]
    _max_grant_version: IgnoredAny,
    #[serde(default, rename = "program")]
    _program: IgnoredAny,
}

/// Whose drivers a disk's two sides are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Driver {
    /// The ones here: a backend's queue serves one request at a time, a frontend's has a pool of pages.
    Gnttab,
    /// Linux's: every request of the ring may be under way.
    Linux,
}

/// A disk.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Disk {
    pub(crate) backend: Spanned<Name>,
    pub(crate) frontend: Spanned<Name>,
    #[serde(default)]
    pub(crate) queues: Bounded<1, 16, 1>,
    #[serde(default)]
    pub(crate) ring_order: Bounded<0, 4, 0>,
    #[serde(default)]
    pub(crate) sharing: Sharing,
    /// As backends here and Linux's allow: 256.
    #[serde(default)]
    pub(crate) indirect_segments: Bounded<0, 256, 32>,
    #[serde(default = "ours")]
    pub(crate) driver: Driver,
    #[serde(default, rename = "image")]
    _image: IgnoredAny,
    #[serde(default, rename = "read-only")]
    _read_only: IgnoredAny,
    #[serde(default, rename = "socket")]
    _socket: IgnoredAny,
    #[serde(default, rename = "port")]
    _port: IgnoredAny,
}

impl Disk {
    /// Pages of data in the largest request.
    pub(crate) fn segments(&self) -> u32 {
        let direct = u32::try_from(MAX_DIRECT_SEGMENTS).unwrap_or(u32::MAX);
        self.indirect_segments.get().max(direct)
    }
}

/// How a network backend gets at what is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Transmit {
    Map,
    Copy,
}

/// A network interface.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Network {
    pub(crate) backend: Spanned<Name>,
    pub(crate) frontend: Spanned<Name>,
    #[serde(default)]
    pub(crate) queues: Bounded<1, 16, 1>,
    #[serde(default = "map")]
    pub(crate) transmit: Transmit,
}

fn ours() -> Driver {
    Driver::Gnttab
}

fn map() -> Transmit {
    Transmit::Map
}

impl Description {
    /// Reads and checks a description.
    pub(crate) fn parse(text: &str) -> Result<Description, Wrong> {
        let description: Description = toml::from_str(text)?;
        if description.domains.is_empty() {
            return Err(Wrong::whole("there is no [[domain]] in it"));
        }
        for (index, domain) in description.domains.iter().enumerate() {
            if description.domains[..index]
                .iter()
                .any(|other| other.name == domain.name)
            {
                let why = format!("there is a domain '{}' already", domain.name.get_ref());
                return Err(Wrong::at(&domain.name, why));
            }
        }
        let disks = description
            .disks
            .iter()
            .map(|disk| (&disk.backend, &disk.frontend));
        let networks = description
            .networks
            .iter()
            .map(|network| (&network.backend, &network.frontend));
        for (backend, frontend) in disks.chain(networks) {
            for name in [backend, frontend] {
                if description.number(name).is_none() {
                    return Err(Wrong::at(
                        name,
                        format!("no domain is called '{}'", name.get_ref()),
                    ));
                }
            }
            if backend == frontend {
                return Err(Wrong::at(frontend, "backend and frontend are the same domain"));
            }
        }
        Ok(description)
    }

    /// Which domain has that name, from 0.
    pub(crate) fn number(&self, name: &Spanned<Name>) -> Option<usize> {
        self.domains.iter().position(|domain| domain.name == *name)
    }
}
