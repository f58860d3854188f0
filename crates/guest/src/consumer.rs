//! Who has how many references of a table, and how many each may have. Pure bookkeeping, under the table's lock.
//!
//! What must always hold:
//! 1. A consumer's `used` is the number of references whose `owner` it is: taken through its handle and not free again,
//!    whatever became of them meanwhile (listed, granted, pending, given up).
//! 2. Nothing here allocates once a consumer, or a frame of the table, has been added.

use alloc::string::String;
use alloc::vec::Vec;
use core::mem;

use crate::free::FreeSet;
use crate::{GrantTable, Granter};

/// How many consumers a table knows: [`ConsumerId`] is a byte.
const MOST: usize = 256;

/// Which consumer of a table; 0 is everybody who has no name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ConsumerId(u8);

/// As many consumers as there may be have names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a grant table has at most {} consumers with a name", MOST - 1)]
pub struct TooManyConsumers;

/// How a consumer of a table stands.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ConsumerStats {
    /// What it is called; empty: everybody who has no name.
    pub name: String,
    /// References that it has.
    pub used: u32,
    /// References that it may have.
    pub quota: u32,
    /// How often it was refused references for that.
    pub refused: u64,
}

/// A consumer may not have more.
pub(crate) struct OverQuota {
    pub(crate) used: u32,
    pub(crate) quota: u32,
}

#[derive(Debug)]
pub(crate) struct Consumers {
    /// Whose each reference is that is not free.
    owner: Vec<ConsumerId>,
    accounts: Vec<ConsumerStats>,
}

impl Consumers {
    pub(crate) fn new() -> Consumers {
        let everybody = ConsumerStats {
            name: String::new(),
            used: 0,
            quota: u32::MAX,
            refused: 0,
        };
        Consumers {
            owner: Vec::new(),
            accounts: alloc::vec![everybody],
        }
    }

    /// How many more it may have.
    pub(crate) fn room(&self, consumer: ConsumerId) -> u32 {
        let account = &self.accounts[usize::from(consumer.0)];
        account.quota.saturating_sub(account.used)
    }

    /// Whether it may have so many more.
    pub(crate) fn check(&mut self, consumer: ConsumerId, wanted: u32) -> Result<(), OverQuota> {
        if wanted <= self.room(consumer) {
            return Ok(());
        }
        let account = &mut self.accounts[usize::from(consumer.0)];
        account.refused += 1;
        Err(OverQuota {
            used: account.used,
            quota: account.quota,
        })
    }

    fn charge(&mut self, consumer: ConsumerId, number: u32) {
        if let Some(owner) = usize::try_from(number).ok().and_then(|at| self.owner.get_mut(at)) {
            *owner = consumer;
            self.accounts[usize::from(consumer.0)].used += 1;
        }
    }

    /// A reference is free again.
    pub(crate) fn discharge(&mut self, number: u32) {
        if let Some(owner) = usize::try_from(number).ok().and_then(|at| self.owner.get(at)) {
            let account = &mut self.accounts[usize::from(owner.0)];
            account.used = account.used.saturating_sub(1);
        }
    }

    /// Makes room for so many references, with a list that has capacity for them; what comes back is to be dropped where
    /// memory may be freed.
    pub(crate) fn extend(&mut self, total: u32, mut owner: Vec<ConsumerId>) -> Vec<ConsumerId> {
        owner.extend_from_slice(&self.owner);
        owner.resize(
            usize::try_from(total).unwrap_or(usize::MAX),
            ConsumerId::default(),
        );
        mem::replace(&mut self.owner, owner)
    }

    fn find(&self, name: &str) -> Option<usize> {
        self.accounts.iter().position(|account| account.name == name)
    }
}

/// Free references, as one consumer takes them.
pub(crate) struct Taker<'a> {
    pub(crate) free: &'a mut FreeSet,
    pub(crate) consumers: &'a mut Consumers,
    pub(crate) consumer: ConsumerId,
}

impl Taker<'_> {
    pub(crate) fn take(&mut self) -> Option<u32> {
        let number = self.free.take()?;
        self.consumers.charge(self.consumer, number);
        Some(number)
    }

    pub(crate) fn take_run(&mut self, count: u32) -> Option<u32> {
        let first = self.free.take_run(count)?;
        (first..first + count).for_each(|number| self.consumers.charge(self.consumer, number));
        Some(first)
    }

    pub(crate) fn len(&self) -> u32 {
        self.free.len()
    }

    pub(crate) fn tail(&self) -> u32 {
        self.free.tail()
    }
}

impl<X: Granter> GrantTable<X> {
    /// The same table, for one of its consumers: a driver, a device, a queue. What is taken through the handle that comes
    /// back, and its clones, is charged to that consumer until it is free again, and is never more than `quota`
    /// references at a time: one driver cannot starve another, whatever its peer does.
    ///
    /// A consumer that asks again by the same name goes on with what it has, under the new quota.
    ///
    /// ```
    /// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/guest/fake.rs"));
    /// use gnttab_guest::{AllocError, Config, GrantTable};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let table = GrantTable::start(Machine::new().domain(DomId(1)), Config::default())?;
    /// let net = table.consumer("vif0", 32)?;
    /// let disk = table.consumer("vbd0", 64)?;
    ///
    /// let all = net.alloc(32)?;
    /// assert_eq!(net.alloc_one().unwrap_err(), AllocError::Quota { wanted: 1, used: 32, quota: 32 });
    /// assert!(disk.alloc_one().is_ok());
    ///
    /// drop(all);
    /// assert!(net.alloc_one().is_ok());
    /// assert_eq!(table.consumers()[1].refused, 1);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`TooManyConsumers`].
    pub fn consumer(&self, name: &str, quota: u32) -> Result<GrantTable<X>, TooManyConsumers> {
        // Memory is taken, and given back, outside the lock.
        let mut new = Some(ConsumerStats {
            name: name.into(),
            used: 0,
            quota,
            refused: 0,
        });
        let mut room = Vec::with_capacity(MOST);
        let id = self.0.state.with(&*self.0.x, |state| {
            let consumers = &mut state.consumers;
            let at = match consumers.find(name) {
                Some(0) => return Ok(0),
                Some(at) => at,
                None if consumers.accounts.len() == MOST => return Err(TooManyConsumers),
                None => {
                    if consumers.accounts.capacity() < MOST {
                        room.append(&mut consumers.accounts);
                        mem::swap(&mut room, &mut consumers.accounts);
                    }
                    consumers.accounts.extend(new.take());
                    consumers.accounts.len() - 1
                }
            };
            consumers.accounts[at].quota = quota;
            u8::try_from(at).map_err(|_| TooManyConsumers)
        })?;
        // A larger quota may be what somebody waited for.
        self.0.wake_waiters();
        Ok(GrantTable(alloc::sync::Arc::clone(&self.0), ConsumerId(id)))
    }

    /// The consumers: first everybody who has no name, then the others in the order in which they came.
    #[must_use]
    pub fn consumers(&self) -> Vec<ConsumerStats> {
        loop {
            let wanted = self
                .0
                .state
                .with(&*self.0.x, |state| state.consumers.accounts.len());
            let mut list: Vec<ConsumerStats> = Vec::with_capacity(wanted);
            // Names are copied under the lock: short, few, and asked for rarely.
            let whole = self.0.state.with(&*self.0.x, |state| {
                let accounts = &state.consumers.accounts;
                list.extend(accounts.iter().take(wanted).cloned());
                accounts.len() == wanted
            });
            if whole {
                return list;
            }
        }
    }
}
