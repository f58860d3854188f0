//! Domains of a running machine that do what they are told: each has joined over the machine's socket.
//!
//! What they can reach is what is granted to them, as for any domain.

use std::collections::BTreeMap;
use std::mem;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use gnttab_abi::{Copy, CopyFlags, CopyPtr, DomId, GrantHandle, GrantRef, GrantStatus, PAGE_SIZE, Transfer};
use gnttab_guest::{
    Access, Call, Config, Grant as Granted, GrantTable, Hypercall as _, MapRequest, Mapper, Mapping, Pending,
    Version,
};
use gnttab_host::monitor::GrantInfo;
use gnttab_host::protocol::Join;
use gnttab_host::runtime::{Domain, JoinError};

use super::world::{Grant, Place, Refused, World};
use crate::control;
use crate::failure::Failure;

/// Pages of a joined domain, and addresses that it has for others'.
const PAGES: u32 = 1024;
const FOREIGN: u32 = 256;

/// Where programs join the machine whose control socket is `control`, or the only one that runs.
pub(crate) fn door(control: Option<&Path>) -> Result<(PathBuf, PathBuf), Failure> {
    let control = match control {
        Some(path) => path.to_owned(),
        None => control::only_one()?,
    };
    let door = control.with_extension(control::JOIN_ENDING);
    Ok((control, door))
}

/// One domain that has joined, and what its drivers hold.
pub(crate) struct Joined {
    pub(crate) domain: Arc<Domain>,
    table: GrantTable<Domain>,
    mapper: Mapper<Domain>,
    grants: BTreeMap<GrantRef, Granted<Domain>>,
    /// Ended while a peer had them.
    pending: BTreeMap<GrantRef, Pending<Domain>>,
    mapped: BTreeMap<GrantHandle, Mapping<Domain>>,
}

impl Joined {
    /// Joins.
    pub(crate) fn new(door: &Path, name: &str) -> Result<Joined, Failure> {
        let join = Join {
            name: name.to_owned(),
            vcpus: 1,
            ram_pages: PAGES,
            foreign_pages: FOREIGN,
        };
        let domain = Domain::join_at(door, &join).map_err(|error| {
            let is_closed = matches!(error, JoinError::Connect { .. });
            let failure = Failure::new(error);
            if is_closed {
                failure.next("start the machine with: gnttab run --join")
            } else {
                failure
            }
        })?;
        let fail = |error: &dyn std::fmt::Display| Failure::new(format!("domain {name}: {error}"));
        let table =
            GrantTable::start(Arc::clone(&domain), Config::default()).map_err(|error| fail(&error))?;
        let window = domain.foreign_window().map_err(|error| fail(&error))?;
        let mapper = Mapper::new(Arc::clone(&domain), window).map_err(|error| fail(&error))?;
        Ok(Joined {
            domain,
            table,
            mapper,
            grants: BTreeMap::new(),
            pending: BTreeMap::new(),
            mapped: BTreeMap::new(),
        })
    }

    pub(crate) fn grant(&mut self, to: DomId, grant: Grant) -> Result<GrantRef, Refused> {
        if grant.part.is_some() {
            return Err(Refused::new(
                "a part of a page is for copies, and pages here are granted whole",
            ));
        }
        let run = self.domain.grantable(1).map_err(Refused::new)?;
        let page = run.page(0).ok_or_else(|| Refused::new("there is no page"))?;
        let gref = self.table.alloc_one().map_err(Refused::new)?;
        let access = access(grant.readonly);
        let granted = self
            .table
            .grant_zeroed(gref, to, page, access)
            .map_err(Refused::new)?;
        let gref = granted.gref();
        self.grants.insert(gref, granted);
        Ok(gref)
    }

    /// Ends access; what a peer still has stays, to be ended again.
    pub(crate) fn end(&mut self, gref: GrantRef) -> Result<(), Refused> {
        let ended = match (self.grants.remove(&gref), self.pending.remove(&gref)) {
            (Some(grant), _) => grant.end(),
            (None, Some(pending)) => pending.retry(),
            (None, None) => return Err(Refused(format!("reference {gref} is not granted"))),
        };
        match ended {
            // The reference and the page are free again.
            Ok(_) => Ok(()),
            Err(pending) => {
                self.pending.insert(gref, pending);
                Err(Refused::new(
                    "a peer still has it: access ends when it lets go (end it again to see)",
                ))
            }
        }
    }

    pub(crate) fn map(&mut self, dom: DomId, gref: GrantRef, readonly: bool) -> Result<GrantHandle, Refused> {
        let request = MapRequest {
            dom,
            gref,
            access: access(readonly),
        };
        let mapping = self.mapper.map_one(request).map_err(Refused::new)?;
        let handle = mapping.handle();
        self.mapped.insert(handle, mapping);
        Ok(handle)
    }

    pub(crate) fn unmap(&mut self, handle: GrantHandle) -> Result<(), Refused> {
        let mapping = self.mapped.remove(&handle);
        let mapping =
            mapping.ok_or_else(|| Refused(format!("{}: handle h{handle}", GrantStatus::BAD_HANDLE)))?;
        mapping.unmap().map_err(Refused::new)
    }

    pub(crate) fn read(&self, place: Place, offset: usize, into: &mut [u8]) -> Result<(), Refused> {
        match place {
            Place::Own(gref) => self.own(gref)?.page().read(offset, into).map_err(Refused::new),
            Place::Mapped(handle) => {
                let at = self.address(handle, offset, into.len())?;
                self.domain.memory().read(at, into).map_err(Refused::new)
            }
        }
    }

    pub(crate) fn write(&self, place: Place, offset: usize, bytes: &[u8]) -> Result<(), Refused> {
        match place {
            Place::Own(gref) => self.own(gref)?.page().write(offset, bytes).map_err(Refused::new),
            Place::Mapped(handle) => {
                let at = self.address(handle, offset, bytes.len())?;
                self.domain.memory().write(at, bytes).map_err(Refused::new)
            }
        }
    }

    fn own(&self, gref: GrantRef) -> Result<&Granted<Domain>, Refused> {
        let granted = self.grants.get(&gref);
        granted.ok_or_else(|| Refused(format!("no page is granted by reference {gref}")))
    }

    fn address(&self, handle: GrantHandle, offset: usize, len: usize) -> Result<usize, Refused> {
        if offset.saturating_add(len) > PAGE_SIZE {
            return Err(Refused::new("past the page"));
        }
        let mapping = self.mapped.get(&handle);
        let mapping = mapping.ok_or_else(|| Refused(format!("there is no mapping h{handle}")))?;
        let at = usize::try_from(mapping.host_addr()).map_err(Refused::new)?;
        Ok(at + offset)
    }

    fn copy(&self, granter: DomId, gref: GrantRef, offset: u16, len: u16) -> Result<Vec<u8>, Refused> {
        let run = self.domain.private(1).map_err(Refused::new)?;
        let page = run.page(0).ok_or_else(|| Refused::new("there is no page"))?;
        let mut item = Copy {
            source: CopyPtr::grant(granter, gref, offset),
            dest: CopyPtr::frame(run.gfn().0, 0),
            len,
            flags: CopyFlags::SOURCE_GREF,
            ..Copy::default()
        };
        let call = Call::Copy(std::slice::from_mut(&mut item));
        self.domain.grant_table_op(call).map_err(Refused::new)?;
        item.status.result().map_err(Refused::new)?;
        let mut bytes = vec![0; usize::from(len).min(PAGE_SIZE)];
        page.read(0, &mut bytes).map_err(Refused::new)?;
        Ok(bytes)
    }

    /// Dies at once: nothing is unmapped and nothing ended by this side.
    fn die(self) {
        self.domain.leave();
        mem::forget((self.grants, self.pending, self.mapped));
    }
}

fn access(readonly: bool) -> Access {
    if readonly {
        Access::ReadOnly
    } else {
        Access::ReadWrite
    }
}

/// See the module.
pub(crate) struct Running {
    control: PathBuf,
    door: PathBuf,
    domains: BTreeMap<DomId, (String, Joined)>,
}

impl Running {
    /// A running machine.
    pub(crate) fn find(control: Option<&Path>) -> Result<Running, Failure> {
        let (control, door) = door(control)?;
        Ok(Running {
            control,
            door,
            domains: BTreeMap::new(),
        })
    }

    fn joined(&mut self, dom: DomId) -> Result<&mut Joined, Refused> {
        match self.domains.get_mut(&dom) {
            Some((_, joined)) => Ok(joined),
            None => Err(Refused(format!("{dom} is not of this shell"))),
        }
    }
}

/// How an entry of the running machine reads, as its observer says.
pub(crate) fn sentence(entry: &GrantInfo) -> String {
    let flags = if entry.flags.is_empty() {
        String::new()
    } else {
        format!("|{}", entry.flags)
    };
    let used = match entry.user {
        Some(user) => format!("in use by d{user}"),
        None => "not in use".to_owned(),
    };
    format!(
        "{}{flags} d{} frame {:#x}, {used}",
        entry.kind, entry.grantee, entry.frame
    )
}

impl World for Running {
    fn domains(&self) -> Vec<(DomId, String)> {
        let named = |(dom, (name, _)): (&DomId, &(String, Joined))| (*dom, name.clone());
        self.domains.iter().map(named).collect()
    }

    fn add(&mut self, name: &str) -> Result<DomId, Refused> {
        let joined = Joined::new(&self.door, name).map_err(Refused::new)?;
        let id = joined.domain.id();
        self.domains.insert(id, (name.to_owned(), joined));
        Ok(id)
    }

    fn grant(&mut self, dom: DomId, to: DomId, grant: Grant) -> Result<GrantRef, Refused> {
        self.joined(dom)?.grant(to, grant)
    }

    fn end(&mut self, dom: DomId, gref: GrantRef, force: bool) -> Result<(), Refused> {
        if force {
            return Err(Refused::new(
                "a domain's driver never frees an entry in use; the machine in memory shows what comes of it",
            ));
        }
        self.joined(dom)?.end(gref)
    }

    fn map(
        &mut self,
        dom: DomId,
        granter: DomId,
        gref: GrantRef,
        readonly: bool,
    ) -> Result<GrantHandle, Refused> {
        self.joined(dom)?.map(granter, gref, readonly)
    }

    fn unmap(&mut self, dom: DomId, handle: GrantHandle) -> Result<(), Refused> {
        self.joined(dom)?.unmap(handle)
    }

    fn read(&mut self, dom: DomId, place: Place, offset: usize, into: &mut [u8]) -> Result<(), Refused> {
        self.joined(dom)?.read(place, offset, into)
    }

    fn write(&mut self, dom: DomId, place: Place, offset: usize, bytes: &[u8]) -> Result<(), Refused> {
        self.joined(dom)?.write(place, offset, bytes)
    }

    fn copy(
        &mut self,
        dom: DomId,
        granter: DomId,
        gref: GrantRef,
        offset: u16,
        len: u16,
    ) -> Result<Vec<u8>, Refused> {
        self.joined(dom)?.copy(granter, gref, offset, len)
    }

    fn accept(&mut self, _dom: DomId, _from: DomId) -> Result<GrantRef, Refused> {
        Err(Refused::new(
            "domains here are translated, and only PV domains transfer; the machine in memory has some",
        ))
    }

    fn transfer(&mut self, dom: DomId, to: DomId, gref: GrantRef) -> Result<(), Refused> {
        let joined = self.joined(dom)?;
        let run = joined.domain.private(1).map_err(Refused::new)?;
        let mut item = Transfer {
            mfn: run.gfn().0,
            domid: to,
            gref,
            ..Transfer::default()
        };
        let call = Call::Transfer(std::slice::from_mut(&mut item));
        joined.domain.grant_table_op(call).map_err(Refused::new)?;
        item.status.result().map_err(Refused::new)
    }

    fn set_version(&mut self, dom: DomId, version: u32) -> Result<(), Refused> {
        let version = match version {
            1 => Version::V1,
            2 => Version::V2,
            _ => return Err(Refused(format!("there is no version {version}"))),
        };
        let joined = self.joined(dom)?;
        if !joined.grants.is_empty() || !joined.pending.is_empty() {
            return Err(Refused::new(
                "its driver switches versions only while nothing is granted: end access first",
            ));
        }
        let config = Config {
            version,
            ..Config::default()
        };
        let table = GrantTable::start(Arc::clone(&joined.domain), config).map_err(Refused::new)?;
        let got = table.version();
        joined.table = table;
        if got == version {
            Ok(())
        } else {
            Err(Refused::new("the hypervisor keeps version 1"))
        }
    }

    fn kill(&mut self, dom: DomId) -> Result<String, Refused> {
        let (_, joined) = self
            .domains
            .remove(&dom)
            .ok_or_else(|| Refused(format!("{dom} is not of this shell")))?;
        joined.die();
        Ok("it has hung up; the monitor takes back what it had".to_owned())
    }

    fn entry(&mut self, dom: DomId, gref: GrantRef) -> Option<String> {
        let mut client = control::connect(Some(&self.control)).ok()?;
        let table = client.table(dom.0).ok()?;
        let entry = table.grants.iter().find(|entry| entry.gref == gref.0);
        Some(entry.map_or_else(|| "free".to_owned(), sentence))
    }

    fn granted(&self, dom: DomId, handle: GrantHandle) -> Option<(DomId, GrantRef)> {
        let mapping = self.domains.get(&dom)?.1.mapped.get(&handle)?;
        Some((mapping.granter(), mapping.gref()))
    }

    fn names(&self, dom: DomId) -> (Vec<GrantRef>, Vec<GrantHandle>) {
        self.domains
            .get(&dom)
            .map_or_else(Default::default, |(_, joined)| {
                let grefs = joined
                    .grants
                    .keys()
                    .chain(joined.pending.keys())
                    .copied()
                    .collect();
                (grefs, joined.mapped.keys().copied().collect())
            })
    }
}
