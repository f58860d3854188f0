//! Patience with a peer that sends events without work behind them (spec 1.5, T-332).

/// Milliseconds that an event channel is left alone at most.
const LONGEST: u32 = 1000;

/// How long to leave an event channel alone before listening to it again.
///
/// A peer may send events as fast as it likes, and each costs us a look at the ring. The second event in a row
/// that had no work behind it is answered after one millisecond, and every further one after twice the time
/// before, up to a second. Work makes all forgotten: a peer that is merely clumsy loses nothing.
///
/// ```
/// use gnttab_io::throttle::EventThrottle;
///
/// let mut throttle = EventThrottle::default();
/// assert_eq!(throttle.after(true), 0);
/// assert_eq!([(); 5].map(|()| throttle.after(false)), [0, 1, 2, 4, 8]);
/// assert_eq!(throttle.after(true), 0);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EventThrottle {
    spurious: u32,
}

impl EventThrottle {
    /// After an event was handled: whether there was work, such as
    /// [`Progress::served`](crate::blkif::Progress::served) above 0. Milliseconds to wait before listening to the
    /// channel again; the ring is looked at once more then, so that nothing is missed.
    pub fn after(&mut self, worked: bool) -> u32 {
        if worked {
            self.spurious = 0;
            return 0;
        }
        self.spurious = self.spurious.saturating_add(1);
        match self.spurious {
            1 => 0,
            // Beyond ten doublings the limit holds anyway.
            count => (1 << (count - 2).min(10)).min(LONGEST),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn t332_a_flood_costs_a_look_a_second() {
        let mut throttle = EventThrottle::default();
        let (mut time, mut looks) = (0, 0);
        while time < 60_000 {
            time += throttle.after(false);
            looks += 1;
        }
        assert!(looks < 75, "{looks} looks in a minute");
        throttle.spurious = u32::MAX;
        assert_eq!(throttle.after(false), LONGEST);
        assert_eq!(throttle.after(true), 0);
    }
}
