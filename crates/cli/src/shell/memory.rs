//! The machine in memory: every domain is PV, which can do most, and its guest writes its table itself.

use std::collections::BTreeMap;
use std::sync::Arc;

use gnttab_abi::{
    Copy, CopyFlags, CopyPtr, DomId, ENTRY_V1_SIZE, ENTRY_V2_SIZE, EntryBodyV2, EntryFlags, EntryHead,
    EntryV1, EntryV2, GrantHandle, GrantRef, GrantStatus, MapFlags, MapGrantRef, NR_RESERVED_ENTRIES,
    PAGE_SIZE, Transfer, UnmapGrantRef, V1_ENTRIES_PER_PAGE, V2_ENTRIES_PER_PAGE,
};
use gnttab_engine::machine::{Guest, Machine, Page};
use gnttab_engine::{
    Config, Domain, DomainKind, Engine, EntryWords, GuestMemory as _, Limits, Processor, Release, Retired,
    Vcpu, Version,
};

use super::world::{Grant, Place, Refused, World};

/// Where domains map: one level-1 table of 512 pages.
const FIRST_PLACE: u64 = 0x4000_0000;
const PLACES: u64 = 512;

/// See the module.
pub(crate) struct Memory {
    machine: Machine,
    engine: Engine<Machine>,
    domains: BTreeMap<DomId, Local>,
    /// Dead, and held by others until they let go.
    dead: Vec<DomId>,
    next: u16,
}

/// What the shell knows of a domain, as the domain's own drivers would.
#[derive(Default)]
struct Local {
    name: String,
    pages: BTreeMap<GrantRef, Option<Page>>,
    mapped: BTreeMap<GrantHandle, Mapped>,
}

struct Mapped {
    granter: DomId,
    gref: GrantRef,
    addr: u64,
}

fn status(status: GrantStatus) -> Result<(), Refused> {
    status.result().map_err(|status| {
        let message = status.message().unwrap_or_default();
        Refused(format!("{status}: {message}"))
    })
}

impl Memory {
    pub(crate) fn new() -> Memory {
        let machine = Machine::new();
        Memory {
            engine: Engine::new(machine.clone(), Config::default()),
            machine,
            domains: BTreeMap::new(),
            dead: Vec::new(),
            next: 1,
        }
    }

    fn local(&mut self, dom: DomId) -> Result<&mut Local, Refused> {
        self.domains
            .get_mut(&dom)
            .ok_or_else(|| Refused(format!("there is no {dom}")))
    }

    fn domain(&self, dom: DomId) -> Result<Arc<Domain<Machine>>, Refused> {
        let living = self
            .engine
            .domain(dom)
            .filter(|_| self.domains.contains_key(&dom));
        living.ok_or_else(|| Refused(format!("there is no {dom}")))
    }

    /// Acts as a domain's processor.
    fn act<T>(
        &self,
        dom: DomId,
        act: impl FnOnce(&mut Processor<'_, Machine>, &Vcpu<Machine>) -> T,
    ) -> Result<T, Refused> {
        let domain = self.domain(dom)?;
        let busy = || Refused(format!("{dom} is busy"));
        let vcpu = Vcpu::take(&domain, 0).ok_or_else(busy)?;
        let mut processor = self.engine.any_processor().ok_or_else(busy)?;
        Ok(act(&mut processor, &vcpu))
    }

    fn words(&self, dom: DomId, gref: GrantRef) -> Option<EntryWords> {
        Some(self.engine.any_processor()?.entry(dom, gref)?.words)
    }

    /// A reference that is free, with the table enlarged where there is none.
    fn free_ref(&mut self, dom: DomId) -> Result<GrantRef, Refused> {
        let mut gref = GrantRef(NR_RESERVED_ENTRIES);
        loop {
            match self.words(dom, gref) {
                None => break,
                Some(words) if words.flags().is_empty() && !self.local(dom)?.pages.contains_key(&gref) => {
                    break;
                }
                Some(_) => gref.0 += 1,
            }
        }
        let domain = self.domain(dom)?;
        let frames = gref.0 / per_page(domain.version()) + 1;
        if frames > domain.frames().0 {
            status(self.act(dom, |processor, vcpu| {
                processor.setup_table(vcpu, DomId::SELF, frames, None, &mut |_, _| true)
            })?)?;
        }
        Ok(gref)
    }

    /// Writes an entry as its guest does: the body, then the head that makes it live.
    fn publish(&self, dom: DomId, gref: GrantRef, head: EntryHead, body: EntryBodyV2) -> Result<(), Refused> {
        let domain = self.domain(dom)?;
        let version = domain.version();
        let beyond = || Refused(format!("{dom} has no entry {gref}"));
        let frame = domain
            .shared_frame(gref.0 / per_page(version))
            .ok_or_else(beyond)?;
        let slot = usize::try_from(gref.0 % per_page(version)).map_err(|_| beyond())?;
        let (at, bytes) = match version {
            Version::V1 => {
                let EntryBodyV2::FullPage { frame } = body else {
                    return Err(Refused::new(
                        "version 1 has whole pages only: switch to version 2",
                    ));
                };
                let frame = u32::try_from(frame).map_err(Refused::new)?;
                (slot * ENTRY_V1_SIZE, EntryV1 { head, frame }.to_bytes().to_vec())
            }
            Version::V2 => (slot * ENTRY_V2_SIZE, EntryV2::new(head, body).to_bytes().to_vec()),
        };
        let words = frame.as_ref();
        let written = words.write(at + 4, &bytes[4..]) && words.write(at, &bytes[..4]);
        written.then_some(()).ok_or_else(beyond)
    }

    fn fresh_page(&self, dom: DomId) -> Result<Page, Refused> {
        let domain = self.domain(dom)?;
        let page = domain.private().add_page();
        page.ok_or_else(|| Refused::new("there is no memory"))
    }

    fn bury(&mut self) {
        let engine = &self.engine;
        self.dead.retain(|dom| engine.retire(*dom) == Retired::Held);
    }
}

fn per_page(version: Version) -> u32 {
    match version {
        Version::V1 => V1_ENTRIES_PER_PAGE,
        Version::V2 => V2_ENTRIES_PER_PAGE,
    }
}

impl World for Memory {
    fn domains(&self) -> Vec<(DomId, String)> {
        let named = |(dom, local): (&DomId, &Local)| (*dom, local.name.clone());
        self.domains.iter().map(named).collect()
    }

    fn add(&mut self, name: &str) -> Result<DomId, Refused> {
        let id = DomId(self.next);
        let guest: Guest = self
            .machine
            .add_domain(id, DomainKind::Pv)
            .map_err(Refused::new)?;
        let created = guest.add_table(FIRST_PLACE);
        created.ok_or_else(|| Refused::new("there is no memory"))?;
        self.engine
            .create_domain(id, DomainKind::Pv, Limits::default(), guest)
            .map_err(Refused::new)?;
        self.next += 1;
        let local = Local {
            name: name.to_owned(),
            ..Local::default()
        };
        self.domains.insert(id, local);
        Ok(id)
    }

    fn grant(&mut self, dom: DomId, to: DomId, grant: Grant) -> Result<GrantRef, Refused> {
        let gref = self.free_ref(dom)?;
        let page = self.fresh_page(dom)?;
        let mut flags = EntryFlags::PERMIT_ACCESS;
        flags.set(EntryFlags::READONLY, grant.readonly);
        flags.set(EntryFlags::SUB_PAGE, grant.part.is_some());
        let frame = page.gfn.0;
        let body = match grant.part {
            Some((page_off, length)) => EntryBodyV2::SubPage {
                page_off,
                length,
                frame,
            },
            None => EntryBodyV2::FullPage { frame },
        };
        self.publish(dom, gref, EntryHead { flags, domid: to }, body)?;
        self.local(dom)?.pages.insert(gref, Some(page));
        Ok(gref)
    }

    fn end(&mut self, dom: DomId, gref: GrantRef, force: bool) -> Result<(), Refused> {
        self.domain(dom)?;
        let beyond = || Refused(format!("{dom} has no entry {gref}"));
        let words = self.words(dom, gref).ok_or_else(beyond)?;
        if words.flags().intersects(EntryFlags::IN_USE) && !force {
            return Err(Refused(format!(
                "{} still has it: nothing was changed",
                words.domid()
            )));
        }
        let head = EntryHead {
            flags: EntryFlags::empty(),
            domid: words.domid(),
        };
        let body = match words {
            EntryWords::V1(entry) => EntryBodyV2::FullPage {
                frame: entry.frame.into(),
            },
            EntryWords::V2(entry, _) => EntryBodyV2::FullPage { frame: entry.frame },
        };
        self.publish(dom, gref, head, body)?;
        self.local(dom)?.pages.remove(&gref);
        Ok(())
    }

    fn map(
        &mut self,
        dom: DomId,
        granter: DomId,
        gref: GrantRef,
        readonly: bool,
    ) -> Result<GrantHandle, Refused> {
        let local = self.local(dom)?;
        let addr = (0..PLACES)
            .map(|place| FIRST_PLACE + place * PAGE_SIZE as u64)
            .find(|addr| local.mapped.values().all(|mapped| mapped.addr != *addr))
            .ok_or_else(|| Refused(format!("{dom} has no room for another mapping")))?;
        let mut flags = MapFlags::HOST_MAP;
        flags.set(MapFlags::READONLY, readonly);
        let mut item = MapGrantRef {
            host_addr: addr,
            flags,
            gref,
            dom: granter,
            ..MapGrantRef::default()
        };
        self.act(dom, |processor, vcpu| {
            processor.map(vcpu, std::slice::from_mut(&mut item));
        })?;
        status(item.status)?;
        let mapped = Mapped { granter, gref, addr };
        self.local(dom)?.mapped.insert(item.handle, mapped);
        Ok(item.handle)
    }

    fn unmap(&mut self, dom: DomId, handle: GrantHandle) -> Result<(), Refused> {
        // A handle that it does not have goes to the hypervisor too, which says so.
        let addr = self
            .local(dom)?
            .mapped
            .get(&handle)
            .map_or(FIRST_PLACE, |mapped| mapped.addr);
        let mut item = UnmapGrantRef {
            host_addr: addr,
            handle,
            ..UnmapGrantRef::default()
        };
        self.act(dom, |processor, vcpu| {
            processor.unmap(vcpu, std::slice::from_mut(&mut item));
        })?;
        status(item.status)?;
        self.local(dom)?.mapped.remove(&handle);
        self.bury();
        Ok(())
    }

    fn read(&mut self, dom: DomId, place: Place, offset: usize, into: &mut [u8]) -> Result<(), Refused> {
        match place {
            Place::Own(gref) => {
                let words = self.own(dom, gref)?;
                let inside = words.read(offset, into);
                inside.then_some(()).ok_or_else(|| Refused::new("past the page"))
            }
            Place::Mapped(handle) => {
                let addr = self.addr(dom, handle, offset, into.len())?;
                let fault = |_| Refused(format!("{dom} cannot read there"));
                self.domain(dom)?.private().read(addr, into).map_err(fault)
            }
        }
    }

    fn write(&mut self, dom: DomId, place: Place, offset: usize, bytes: &[u8]) -> Result<(), Refused> {
        match place {
            Place::Own(gref) => {
                let words = self.own(dom, gref)?;
                let inside = words.write(offset, bytes);
                inside.then_some(()).ok_or_else(|| Refused::new("past the page"))
            }
            Place::Mapped(handle) => {
                let addr = self.addr(dom, handle, offset, bytes.len())?;
                let fault = |_| Refused(format!("page fault: {dom} may not write there"));
                self.domain(dom)?.private().write(addr, bytes).map_err(fault)
            }
        }
    }

    fn copy(
        &mut self,
        dom: DomId,
        granter: DomId,
        gref: GrantRef,
        offset: u16,
        len: u16,
    ) -> Result<Vec<u8>, Refused> {
        let page = self.fresh_page(dom)?;
        let mut item = Copy {
            source: CopyPtr::grant(granter, gref, offset),
            dest: CopyPtr::frame(page.gfn.0, 0),
            len,
            flags: CopyFlags::SOURCE_GREF,
            ..Copy::default()
        };
        self.act(dom, |processor, vcpu| {
            processor.copy(vcpu, std::slice::from_mut(&mut item));
        })?;
        let mut bytes = vec![0; usize::from(len).min(PAGE_SIZE)];
        let read = self
            .machine
            .page(page.mfn)
            .is_some_and(|words| words.read(0, &mut bytes));
        self.domain(dom)?.private().give_up(page.mfn);
        status(item.status)?;
        read.then_some(bytes).ok_or_else(|| Refused::new("past the page"))
    }

    fn accept(&mut self, dom: DomId, from: DomId) -> Result<GrantRef, Refused> {
        let gref = self.free_ref(dom)?;
        let head = EntryHead {
            flags: EntryFlags::ACCEPT_TRANSFER,
            domid: from,
        };
        self.publish(dom, gref, head, EntryBodyV2::FullPage { frame: 0 })?;
        self.local(dom)?.pages.insert(gref, None);
        Ok(gref)
    }

    fn transfer(&mut self, dom: DomId, to: DomId, gref: GrantRef) -> Result<(), Refused> {
        let page = self.fresh_page(dom)?;
        let mut item = Transfer {
            mfn: page.mfn.0,
            domid: to,
            gref,
            ..Transfer::default()
        };
        self.act(dom, |processor, vcpu| {
            processor.transfer(vcpu, std::slice::from_mut(&mut item));
        })?;
        status(item.status)?;
        if let Some(local) = self.domains.get_mut(&to) {
            local.pages.insert(gref, Some(page));
        }
        Ok(())
    }

    fn set_version(&mut self, dom: DomId, version: u32) -> Result<(), Refused> {
        self.act(dom, |processor, vcpu| processor.set_version(vcpu, version))?
            .map_err(Refused::new)?;
        // The entries behind the reserved ones are gone.
        self.local(dom)?
            .pages
            .retain(|gref, _| gref.0 < NR_RESERVED_ENTRIES);
        Ok(())
    }

    fn kill(&mut self, dom: DomId) -> Result<String, Refused> {
        let domain = self.domain(dom)?;
        domain.private().set_dying();
        self.engine.begin_teardown(&domain);
        let vcpus: Vec<Vcpu<Machine>> = Vcpu::take(&domain, 0).into_iter().collect();
        let busy = || Refused(format!("{dom} is busy"));
        let mut processor = self.engine.any_processor().ok_or_else(busy)?;
        while let Release::More { .. } = processor.release_mappings(&vcpus, 256) {}
        drop((processor, vcpus));
        domain.private().drop_address_space();
        domain.private().give_up_memory();
        drop(domain);
        self.domains.remove(&dom);
        self.dead.push(dom);
        self.bury();
        Ok(if self.dead.contains(&dom) {
            "dead; others still have pages of it, which stay until they let go".to_owned()
        } else {
            "dead and gone; what it had mapped was released".to_owned()
        })
    }

    fn entry(&mut self, dom: DomId, gref: GrantRef) -> Option<String> {
        Some(match self.words(dom, gref)? {
            EntryWords::V1(entry) => format!("{}  {entry}", hex(&entry.to_bytes())),
            EntryWords::V2(entry, status) => {
                let marks = match (
                    status.contains(EntryFlags::READING),
                    status.contains(EntryFlags::WRITING),
                ) {
                    (_, true) => "reading|writing",
                    (true, false) => "reading",
                    (false, false) => "not in use",
                };
                format!(
                    "{} {:04x}  {entry}, status {marks}",
                    hex(&entry.to_bytes()),
                    status.bits()
                )
            }
        })
    }

    fn granted(&self, dom: DomId, handle: GrantHandle) -> Option<(DomId, GrantRef)> {
        let mapped = self.domains.get(&dom)?.mapped.get(&handle)?;
        Some((mapped.granter, mapped.gref))
    }

    fn names(&self, dom: DomId) -> (Vec<GrantRef>, Vec<GrantHandle>) {
        let local = self.domains.get(&dom);
        local.map_or_else(Default::default, |local| {
            let grefs = local.pages.keys().copied().collect();
            (grefs, local.mapped.keys().copied().collect())
        })
    }
}

impl Memory {
    fn own(&mut self, dom: DomId, gref: GrantRef) -> Result<Arc<gnttab_engine::PageWords>, Refused> {
        let page = self.local(dom)?.pages.get(&gref).copied().flatten();
        let words = page.and_then(|page| self.machine.page(page.mfn));
        words.ok_or_else(|| Refused(format!("{dom} has no page behind {gref}")))
    }

    fn addr(&mut self, dom: DomId, handle: GrantHandle, offset: usize, len: usize) -> Result<u64, Refused> {
        if offset.saturating_add(len) > PAGE_SIZE {
            return Err(Refused::new("past the page"));
        }
        let mapped = self.local(dom)?.mapped.get(&handle);
        let mapped = mapped.ok_or_else(|| Refused(format!("{dom} has no mapping h{handle}")))?;
        Ok(mapped.addr + u64::try_from(offset).unwrap_or(0))
    }
}

/// Words of 32 bits, as they lie in memory of this byte order.
fn hex(bytes: &[u8]) -> String {
    let words = bytes.as_chunks::<4>().0.iter();
    let words: Vec<String> = words
        .map(|word| format!("{:08x}", u32::from_le_bytes(*word)))
        .collect();
    words.join(" ")
}
