//! Who has to wait so that somebody else's transaction comes to an end.
//!
//! Of two that use the same nodes the quicker one can win every time, and a
//! domain that writes without pause can keep the toolstack from ever
//! committing a transaction in which it reads what that domain writes. So a
//! connection that has lost some transactions in a row has those held back
//! that it lost to, until its next transaction succeeds.
//!
//! This must not become a weapon: only who has changed what the loser used is
//! held, for a moment at the longest, and an unprivileged domain never makes
//! the control domain wait. Who is being helped is not held, so two never wait
//! for each other.

use crate::store::ConnId;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Transactions lost in a row that are just bad luck.
const BAD_LUCK: u32 = 3;

/// The longest that a connection is held back for one loss of another's.
const LONGEST: Duration = Duration::from_millis(20);

#[derive(Default, Debug)]
pub(super) struct Fairness {
    /// Those who lost their last transactions: how many, and whom that holds
    /// back until when.
    losers: BTreeMap<ConnId, (u32, BTreeMap<ConnId, Instant>)>,
}

impl Fairness {
    /// A connection lost a transaction to another. Gives whether the other is
    /// held from now on; `may_hold` says whether the loser has the standing.
    pub(super) fn lost(&mut self, loser: ConnId, winner: ConnId, may_hold: bool, now: Instant) -> bool {
        let winner_is_helped = self.losers.get(&winner).is_some_and(|(_, held)| !held.is_empty());
        let (losses, held) = self.losers.entry(loser).or_default();
        *losses = losses.saturating_add(1);
        let hold = *losses > BAD_LUCK && may_hold && !winner_is_helped && winner != loser;
        if hold {
            held.insert(winner, now + LONGEST);
        }
        hold
    }

    /// A connection's transaction has succeeded, or it will never have one
    /// again. Gives those who may have been held for it.
    pub(super) fn done(&mut self, conn: ConnId) -> Vec<ConnId> {
        let (_, held) = self.losers.remove(&conn).unwrap_or_default();
        held.into_keys().collect()
    }

    /// Those whose time is over.
    pub(super) fn expired(&mut self, now: Instant) -> Vec<ConnId> {
        let mut freed = Vec::new();
        for (_, held) in self.losers.values_mut() {
            held.retain(|winner, until| {
                let waits = *until > now;
                if !waits {
                    freed.push(*winner);
                }
                waits
            });
        }
        freed
    }

    pub(super) fn is_held(&self, conn: ConnId) -> bool {
        self.losers.values().any(|(_, held)| held.contains_key(&conn))
    }

    /// When the next one's time is over.
    pub(super) fn next_expiry(&self) -> Option<Instant> {
        self.losers
            .values()
            .flat_map(|(_, held)| held.values())
            .min()
            .copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: ConnId = ConnId::for_test(1);
    const B: ConnId = ConnId::for_test(2);

    /// Loses until the winner is held; gives how often that took.
    fn lose(fairness: &mut Fairness, loser: ConnId, winner: ConnId, now: Instant) -> Option<u32> {
        (1..=10).find(|_| fairness.lost(loser, winner, true, now))
    }

    #[test]
    fn who_wins_too_often_waits_until_the_loser_succeeds() {
        let (mut fairness, now) = (Fairness::default(), Instant::now());
        assert_eq!(lose(&mut fairness, A, B, now), Some(4));
        assert!(fairness.is_held(B) && !fairness.is_held(A));
        assert_eq!(fairness.done(A), [B]);
        assert!(!fairness.is_held(B));
        assert_eq!(
            lose(&mut fairness, A, B, now),
            Some(4),
            "and it counts from the start again"
        );
    }

    #[test]
    fn nobody_waits_for_long() {
        let (mut fairness, now) = (Fairness::default(), Instant::now());
        lose(&mut fairness, A, B, now);
        assert_eq!(fairness.next_expiry(), Some(now + LONGEST));
        assert_eq!(fairness.expired(now), []);
        assert_eq!(fairness.expired(now + LONGEST), [B]);
        assert!(!fairness.is_held(B));
        assert_eq!(fairness.next_expiry(), None);
    }

    #[test]
    fn two_never_wait_for_each_other_and_nobody_for_itself() {
        let (mut fairness, now) = (Fairness::default(), Instant::now());
        lose(&mut fairness, A, B, now);
        assert_eq!(lose(&mut fairness, B, A, now), None);
        assert_eq!(lose(&mut fairness, B, B, now), None);
    }

    #[test]
    fn without_standing_nobody_is_held() {
        let (mut fairness, now) = (Fairness::default(), Instant::now());
        for _ in 0..10 {
            assert!(!fairness.lost(A, B, false, now));
        }
        assert!(!fairness.is_held(B));
    }
}
