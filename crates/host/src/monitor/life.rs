//! How domains come to be and how they end.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::ExitStatus;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use gnttab_abi::DomId;
use gnttab_engine::{CreateError, Domain, DomainKind, MAX_GRANT_FRAMES, Release, Vcpu};
use gnttab_xenstore::DomId as StoreDomId;
use gnttab_xenstore::client::Nodes;
use gnttab_xenstore::perms::{Access as StoreAccess, Perms};
use rustix::process::{Pid, PidfdFlags, Signal};

use super::machine::{Guest, Machine};
use super::memory::{MOST_RAM_PAGES, Memory};
use super::tables::Tables;
use super::{DomainSpec, Ended, MonitorError, MonitorState, Process, Running, Serving, Shared, vcpu};
use crate::area::Server;
use crate::confine::Isolation;
use crate::launch::{Launched, Program};
use crate::protocol::{ABI, Hello, Notice, NoticeKind};
use crate::sys::Channel;

/// Handles looked at in one step of a burial, so that another one does not wait for it long.
const RELEASE_BUDGET: u32 = 1024;
/// The token of the monitor's own doorbell.
pub(super) const DOORBELL: u64 = u64::MAX;
/// Added to a domain's number: the token of its channel. Without it: of its process.
const CHANNEL: u64 = 1 << 32;
/// The engine's processor that burials use; threads of vCPUs have the next ones, observers the last.
pub(super) const SERVICE_PROCESSOR: usize = 0;
/// Ends of domains that are remembered.
const REMEMBERED: usize = 1024;
/// How long a process may live on after it has closed its channel.
const SILENCE: Duration = Duration::from_secs(1);
/// Bytes of stack of a thread that serves a vCPU.
const VCPU_STACK: usize = 256 * 1024;

/// What was set aside for a domain that is being made. Not given back: it has become the domain's.
struct Reserved {
    id: DomId,
    processors: Vec<usize>,
}

impl MonitorState {
    /// Whether there is a domain of that number, coming, running or going.
    pub(super) fn exists(&self, id: DomId) -> bool {
        self.running.contains_key(&id) || self.busy.contains(&id)
    }

    fn free_id(&mut self, shared: &Shared) -> Option<DomId> {
        let ordinary = 1..DomId::FIRST_RESERVED.0;
        for _ in ordinary.clone() {
            let id = DomId(self.next_id);
            self.next_id = if ordinary.contains(&(self.next_id + 1)) {
                self.next_id + 1
            } else {
                1
            };
            if !self.exists(id) && shared.engine.domain(id).is_none() {
                return Some(id);
            }
        }
        None
    }
}

impl Shared {
    pub(super) fn state(&self) -> MutexGuard<'_, MonitorState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets a number and processors aside.
    fn reserve(&self, spec: &DomainSpec) -> Result<Reserved, MonitorError> {
        let mut state = self.state();
        if state.stopping {
            return Err(MonitorError::Stopping);
        }
        let id = match spec.id {
            // The store takes domain 0 for the control domain, which is the monitor's own part.
            Some(id) if id.0 == 0 || !id.is_ordinary() => return Err(MonitorError::BadNumber(id)),
            Some(id) if state.exists(id) => return Err(MonitorError::Exists(id)),
            Some(id) => id,
            None => state.free_id(self).ok_or(MonitorError::NoNumber)?,
        };
        let (asked, most) = (spec.limits.vcpus, self.settings.max_vcpus);
        let free = (SERVICE_PROCESSOR + 1..=most).filter(|number| !state.processors.contains(number));
        let processors: Vec<usize> = free.take(asked).collect();
        if processors.len() < asked {
            return Err(MonitorError::TooManyVcpus {
                name: spec.name.clone(),
                asked,
                most,
            });
        }
        state.processors.extend(&processors);
        state.busy.insert(id);
        state.ended.remove(&id);
        Ok(Reserved { id, processors })
    }

    fn give_back(&self, reserved: &Reserved) {
        let mut state = self.state();
        for number in &reserved.processors {
            state.processors.remove(number);
        }
        state.busy.remove(&reserved.id);
    }

    /// Makes a domain and starts its program.
    pub(super) fn create(self: &Arc<Self>, mut spec: DomainSpec) -> Result<DomId, MonitorError> {
        check(&spec)?;
        let reserved = self.reserve(&spec)?;
        spec.program.confinement.user = Some(self.settings.first_user + u32::from(reserved.id.0));
        let program = std::mem::replace(&mut spec.program, Program::role(""));
        let launched = match self.starter.start(program) {
            Ok(launched) => launched,
            Err(source) => {
                self.give_back(&reserved);
                return Err(MonitorError::Launch {
                    name: spec.name,
                    source,
                });
            }
        };
        let Launched {
            mut child,
            channel,
            isolation,
        } = launched;
        let missing = isolation.missing();
        let made = if self.settings.require_isolation && !missing.is_empty() {
            Err(MonitorError::NotIsolated {
                name: spec.name.clone(),
                missing,
            })
        } else {
            self.make(&spec, &reserved, channel, Some(isolation))
        };
        let pidfd = i32::try_from(child.id())
            .ok()
            .and_then(Pid::from_raw)
            .ok_or(rustix::io::Errno::SRCH);
        let pidfd = pidfd.and_then(|pid| rustix::process::pidfd_open(pid, PidfdFlags::empty()));
        match (made, pidfd) {
            (Ok(mut running), Ok(pidfd)) => {
                running.process = Some(Process { child, pidfd });
                self.begin(reserved, running)
            }
            (made, pidfd) => {
                // A program that ends at once makes no error: `pidfd_open` finds it until it is reaped.
                let _ = child.kill();
                let _ = child.wait();
                let failed = pidfd.err().map(MonitorError::errno("pidfd_open"));
                match made {
                    Ok(running) => {
                        self.bury(reserved.id, running);
                        Err(failed.unwrap_or(MonitorError::Stopping))
                    }
                    Err(error) => {
                        self.give_back(&reserved);
                        Err(error)
                    }
                }
            }
        }
    }

    /// Makes a program that has joined a domain.
    pub(super) fn admit(&self, spec: &DomainSpec, channel: Channel) -> Result<DomId, MonitorError> {
        check(spec)?;
        let reserved = self.reserve(spec)?;
        match self.make(spec, &reserved, channel, None) {
            Ok(running) => self.begin(reserved, running),
            Err(error) => {
                self.give_back(&reserved);
                Err(error)
            }
        }
    }

    /// Everything of a domain but its process: memory, table, a place in the store, threads that serve it,
    /// and the words that tell the process so.
    fn make(
        &self,
        spec: &DomainSpec,
        reserved: &Reserved,
        channel: Channel,
        isolation: Option<Isolation>,
    ) -> Result<Running, MonitorError> {
        let id = reserved.id;
        let machine = self.engine.hypervisor();
        let no_memory = |source| MonitorError::Memory {
            name: spec.name.clone(),
            source,
        };
        let number = machine.memory_number();
        let memory = Memory::new(number, id, spec.ram_pages, spec.shareable_pages).map_err(no_memory)?;
        let memory = Arc::new(memory);
        let max_frames = spec
            .limits
            .grant_frames
            .unwrap_or(self.settings.engine.max_grant_frames);
        // The engine says what is wrong with a limit that is none.
        let tables = Tables::new(max_frames.clamp(1, MAX_GRANT_FRAMES)).map_err(no_memory)?;
        let tables = Arc::new(tables);
        let (store, store_end) = UnixStream::pair().map_err(MonitorError::io("the store's connection"))?;
        let hello = Hello {
            domain: id,
            vcpus: u16::try_from(spec.limits.vcpus).unwrap_or(u16::MAX),
            ram_pages: spec.ram_pages,
            foreign_pages: spec.foreign_pages,
            table_pages: u32::try_from(tables.pages()).unwrap_or(u32::MAX),
        };
        let exposure = memory.exposure().map_err(no_memory)?;
        let descriptors = [memory.ram(), tables.file(), exposure.as_fd(), store_end.as_fd()];
        let unheard = |source| MonitorError::Channel {
            name: spec.name.clone(),
            source,
        };
        channel.send(&hello.encode(), &descriptors).map_err(unheard)?;

        let guest = Guest::new(
            id,
            Arc::clone(&memory),
            Arc::clone(&tables),
            channel,
            (spec.ram_pages, spec.foreign_pages),
            Arc::clone(&self.doorbell),
        );
        let kind = if cfg!(target_arch = "aarch64") {
            DomainKind::Arm
        } else {
            DomainKind::Hvm
        };
        debug_assert_eq!(ABI.word_size(), 8, "domains are 64-bit");
        let domain = self.engine.create_domain(id, kind, spec.limits, guest);
        let domain = domain.map_err(|source| MonitorError::Create {
            name: spec.name.clone(),
            source,
        })?;
        machine.add_memory(&memory);
        let mut running = Running {
            name: spec.name.clone(),
            domain,
            isolation,
            process: None,
            vcpus: Vec::new(),
            silent_since: None,
            since: Instant::now(),
        };
        match self.connect(&mut running, reserved, store) {
            Ok(()) => Ok(running),
            Err(error) => {
                self.dismantle(id, running);
                Err(error)
            }
        }
    }

    /// Gives a domain its place in the store and the threads that serve it.
    fn connect(
        &self,
        running: &mut Running,
        reserved: &Reserved,
        store: UnixStream,
    ) -> Result<(), MonitorError> {
        let id = StoreDomId::new(reserved.id.0);
        self.store.introduce_domain(id)?;
        self.make_home(&running.name, id)?;
        self.store.add_connection(store, id)?;
        for (number, &processor) in reserved.processors.iter().enumerate() {
            let area = Server::new().map_err(|source| MonitorError::Memory {
                name: running.name.clone(),
                source,
            })?;
            let notice = Notice {
                kind: NoticeKind::Vcpu,
                key: number as u64,
            };
            let sent = running.domain.private().send(notice, &[area.memory()]);
            sent.map_err(|source| MonitorError::Channel {
                name: running.name.clone(),
                source,
            })?;
            let closer = area.closer();
            let (engine, domain) = (Arc::clone(&self.engine), Arc::clone(&running.domain));
            let thread = thread::Builder::new()
                .name(format!("{}v{number}", reserved.id))
                .stack_size(VCPU_STACK)
                .spawn(move || {
                    if let Some(vcpu) = Vcpu::take(&domain, number) {
                        vcpu::serve(&engine, processor, &vcpu, &area);
                    }
                })
                .map_err(MonitorError::io("a thread for a vCPU"))?;
            running.vcpus.push(Serving {
                closer,
                thread,
                processor,
            });
        }
        Ok(())
    }

    /// The domain's part of the store, which is its own to write.
    fn make_home(&self, name: &str, id: StoreDomId) -> Result<(), MonitorError> {
        let mut store = self.store.connect()?;
        let home = format!("/local/domain/{}", id.get());
        let owned = Perms::new(id, StoreAccess::None);
        // What a dead domain of that number has left.
        let _ = store.rm(&home);
        for (node, value) in [("", ""), ("/name", name), ("/domid", &id.get().to_string())] {
            let path = format!("{home}{node}");
            store.write(&path, value)?;
            store.set_perms(&path, &owned)?;
        }
        Ok(())
    }

    /// From here on the domain is watched.
    fn begin(&self, reserved: Reserved, running: Running) -> Result<DomId, MonitorError> {
        let id = reserved.id;
        let token = u64::from(id.0);
        let mut state = self.state();
        let watched = match &running.process {
            Some(process) => self.poller.add(&process.pidfd, token),
            None => Ok(()),
        };
        let watched = watched.and_then(|()| {
            // A domain has nothing to say there; if it does, that fills its own queue.
            self.poller
                .add_end(&running.domain.private().channel, token | CHANNEL)
        });
        if let Err(errno) = watched {
            drop(state);
            self.bury(id, running);
            return Err(MonitorError::errno("epoll")(errno));
        }
        state.busy.remove(&id);
        state.running.insert(id, running);
        drop(state);
        // The undertaker may have looked before there was anything to see: a crash, a stop.
        let _ = self.doorbell.send();
        Ok(id)
    }

    /// The undertaker's work: until the monitor stops, buries whoever dies.
    pub(super) fn watch(&self) {
        loop {
            let Ok(events) = self.poller.wait(self.end_the_silent()) else {
                // Only a defect of this program makes epoll fail; nothing would be buried any more.
                return self.stop();
            };
            for event in events {
                if event.token == DOORBELL {
                    let _ = self.heard.take();
                    self.end_the_crashed();
                } else {
                    self.look_after(event.token);
                }
            }
            if self.state().stopping {
                return self.stop();
            }
        }
    }

    /// A process has ended, or has closed its channel.
    fn look_after(&self, token: u64) {
        let Ok(id) = u16::try_from(token & !CHANNEL).map(DomId) else {
            return;
        };
        if token & CHANNEL == 0 {
            return self.bury_running(id);
        }
        let mut state = self.state();
        let Some(running) = state.running.get_mut(&id) else {
            return;
        };
        let channel = &running.domain.private().channel;
        let _ = self.poller.remove(channel);
        if running.process.is_some() {
            // Most likely it is on its way out, and its status is to be its own.
            running.silent_since = Some(Instant::now());
        } else {
            drop(state);
            self.bury_running(id);
        }
    }

    /// Kills those whose process lives on though it has closed its channel. How long until the next.
    fn end_the_silent(&self) -> Option<Duration> {
        let mut next = None;
        for running in self.state().running.values_mut() {
            let (Some(since), Some(process)) = (running.silent_since, &running.process) else {
                continue;
            };
            let left = SILENCE.saturating_sub(since.elapsed());
            if left.is_zero() {
                process.kill();
                running.silent_since = None;
            } else {
                next = Some(next.map_or(left, |next: Duration| next.min(left)));
            }
        }
        next
    }

    /// Kills those that must not run on; who has no process of ours is buried at once.
    fn end_the_crashed(&self) {
        let mut without_process = Vec::new();
        for (id, running) in &self.state().running {
            if running.domain.private().crashed().is_none() {
                continue;
            }
            match &running.process {
                Some(process) => process.kill(),
                None => without_process.push(*id),
            }
        }
        for id in without_process {
            self.bury_running(id);
        }
    }

    fn bury_running(&self, id: DomId) {
        let mut state = self.state();
        let Some(running) = state.running.remove(&id) else {
            return;
        };
        state.busy.insert(id);
        drop(state);
        self.bury(id, running);
    }

    /// Takes everything back that a domain had, in the order of the module's rule 1.
    fn bury(&self, id: DomId, mut running: Running) {
        let processors: Vec<usize> = running.vcpus.iter().map(|vcpu| vcpu.processor).collect();
        let status = running.process.take().and_then(Process::end);
        let crashed = running.domain.private().crashed();
        self.dismantle(id, running);
        let mut state = self.state();
        for number in processors {
            state.processors.remove(&number);
        }
        state.busy.remove(&id);
        let ended = Ended { status, crashed };
        let news = &self.engine.hypervisor().news;
        news.died(id, || ended.to_string());
        state.ended.insert(id, ended);
        while state.ended.len() > REMEMBERED {
            state.ended.pop_first();
        }
        self.ended.notify_all();
    }

    fn dismantle(&self, id: DomId, running: Running) {
        let Running { domain, vcpus, .. } = running;
        self.engine.begin_teardown(&domain);
        for vcpu in &vcpus {
            vcpu.closer.close();
        }
        for vcpu in vcpus {
            // One that panicked has let go of everything all the same.
            let _ = vcpu.thread.join();
        }
        let guest = domain.private();
        guest.forget_mappings(self.engine.hypervisor());
        self.release(&domain);
        guest.ports.close_all();
        if let Ok(mut store) = self.store.connect() {
            let _ = store.rm(&format!("/local/domain/{}", id.0));
        }
        // It may not have come so far as to be introduced.
        let _ = self.store.release_domain(StoreDomId::new(id.0));
        self.engine.hypervisor().retire_memory(&guest.memory);
        self.engine.retire(id);
    }

    /// Releases the mappings that a dead domain held.
    fn release(&self, domain: &Arc<Domain<Machine>>) {
        let vcpus: Vec<Vcpu<Machine>> = (0..domain.limits().vcpus)
            .filter_map(|number| Vcpu::take(domain, number))
            .collect();
        while let Some(Release::More { .. }) =
            self.with_processor(|processor| processor.release_mappings(&vcpus, RELEASE_BUDGET))
        {}
    }

    /// Ends everything.
    fn stop(&self) {
        loop {
            let next = {
                let mut state = self.state();
                state.stopping = true;
                state.running.first_key_value().map(|(id, _)| *id)
            };
            match next {
                Some(id) => self.bury_running(id),
                None => return,
            }
        }
    }
}

/// What cannot be, before anything is set aside for it.
fn check(spec: &DomainSpec) -> Result<(), MonitorError> {
    let (name, asked) = (spec.name.clone(), spec.ram_pages);
    if asked == 0 || asked > MOST_RAM_PAGES {
        return Err(MonitorError::RamPages { name, asked });
    }
    if spec.limits.vcpus == 0 {
        return Err(MonitorError::Create {
            name,
            source: CreateError::NoVcpus,
        });
    }
    Ok(())
}

impl Process {
    pub(super) fn kill(&self) {
        // It may be dead already.
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
    }

    /// Whether a signal has stopped it. It is not reaped, so the number is nobody else's.
    pub(super) fn is_stopped(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id()));
        // The name before the state may have anything in it.
        stat.is_ok_and(|stat| {
            stat.rsplit_once(") ")
                .is_some_and(|(_, rest)| rest.starts_with('T'))
        })
    }

    /// Lets it go on.
    pub(super) fn go_on(&self) {
        // It may be dead already.
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::CONT);
    }

    /// Kills it, if it lives, and reaps it.
    fn end(mut self) -> Option<ExitStatus> {
        self.kill();
        self.child.wait().ok()
    }
}
