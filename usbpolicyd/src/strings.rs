//! The strings of plugged-in devices, which wait for their device's lock (`drivers/usb/core/sysfs.c`): who still has to be
//! read, and what was read. Pure; the reading itself is a worker's job.
//!
//! The host's drivers hold the lock while they look at a new device, and a device that hangs in a request of its VM holds
//! it for 5 s, again and again. So strings are read once for each plug-in, and once more when its authorization changes, since
//! the kernel then reads them from the device again. A device whose strings were never read is not there yet: nobody
//! decides about a device that is half known.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::facts::Strings;
use crate::sysfs::{Plug, Scan};

/// After so long the operator is told whom we wait for. A request of a driver ends after 5 s.
const PATIENCE: Duration = Duration::from_secs(5);

/// Strings to be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    /// Of whom.
    pub plug: Plug,
    /// Whether the device was authorized when they were asked for.
    pub authorized: bool,
}

/// What is known of one plug-in.
#[derive(Debug, Default)]
struct Known {
    /// What was read last, and whether the device was authorized then.
    read: Option<(bool, Strings)>,
    /// Since when somebody reads.
    reading: Option<Duration>,
    /// The operator was told that it takes long.
    told: bool,
}

/// All of them.
#[derive(Debug, Default)]
pub struct StringCache {
    known: BTreeMap<Plug, Known>,
}

impl StringCache {
    /// Takes over what a former run of this daemon knew of a device that it gave away.
    pub fn recall(&mut self, plug: Plug, authorized: bool, strings: Strings) {
        self.known.insert(plug, Known { read: Some((authorized, strings)), ..Known::default() });
    }

    /// Fills in the strings that are known, takes out the devices that have none yet, and says what is to be read now.
    pub fn complete(&mut self, now: Duration, scan: &mut Scan) -> Vec<Order> {
        let mut before = std::mem::take(&mut self.known);
        let mut orders = Vec::new();
        scan.devices.retain_mut(|present| {
            let known = self.known.entry(present.plug.clone()).or_default();
            *known = before.remove(&present.plug).unwrap_or_default();
            let authorized = present.facts.authorized;
            let is_current = known.read.as_ref().is_some_and(|(then, _)| *then == authorized);
            if !is_current && known.reading.is_none() {
                known.reading = Some(now);
                orders.push(Order { plug: present.plug.clone(), authorized });
            }
            let Some((_, strings)) = &known.read else { return false };
            present.facts.set_strings(strings.clone());
            true
        });
        orders
    }

    /// Strings were read; `None` when the plug-in was no longer there. Returns how long it took if the operator was told
    /// that it does.
    pub fn arrived(&mut self, now: Duration, order: Order, strings: Option<Strings>) -> Option<Duration> {
        let known = self.known.get_mut(&order.plug)?;
        let since = known.reading.take()?;
        if let Some(strings) = strings {
            known.read = Some((order.authorized, strings));
        }
        std::mem::take(&mut known.told).then(|| now.saturating_sub(since))
    }

    /// Devices that are waited for so long that the operator should know, each told once.
    pub fn late(&mut self, now: Duration) -> Vec<Plug> {
        let late = self.known.iter_mut().filter(|(_, known)| {
            !known.told && known.reading.is_some_and(|since| since.saturating_add(PATIENCE) <= now)
        });
        let tell = |(plug, known): (&Plug, &mut Known)| {
            known.told = true;
            plug.clone()
        };
        late.map(tell).collect()
    }

    /// When [`Self::late`] has something to say next.
    pub fn deadline(&self) -> Option<Duration> {
        let untold = self.known.values().filter(|known| !known.told);
        untold.filter_map(|known| Some(known.reading?.saturating_add(PATIENCE))).min()
    }

    /// How many devices the operator was told about that still do not answer.
    pub fn silent(&self) -> usize {
        self.known.values().filter(|known| known.told).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sysfs::tests::{Tree, put};
    use crate::sysfs::{Sysfs, read_strings};

    const NOW: Duration = Duration::from_secs(1000);

    fn scan(tree: &Tree) -> Scan {
        Sysfs::new(tree.dir.path()).scan_without_strings().unwrap()
    }

    /// Scans and completes; the serials of those who are there, and the orders.
    fn look(cache: &mut StringCache, tree: &Tree) -> (Vec<Option<String>>, Vec<Order>) {
        let mut scan = scan(tree);
        let orders = cache.complete(NOW, &mut scan);
        (scan.devices.into_iter().map(|one| one.facts.serial).collect(), orders)
    }

    fn carry_out(cache: &mut StringCache, orders: Vec<Order>) {
        for order in orders {
            let strings = read_strings(&order.plug);
            cache.arrived(NOW, order, strings);
        }
    }

    #[test]
    fn device_is_there_when_its_strings_are_and_they_are_asked_for_once() {
        let (tree, mut cache) = (Tree::new(), StringCache::default());
        tree.plug("1-1", 3);
        let (there, orders) = look(&mut cache, &tree);
        assert_eq!((there.len(), orders.len()), (0, 1));
        // Whoever looks again meanwhile starts no second reader.
        assert_eq!(look(&mut cache, &tree), (vec![], vec![]));
        carry_out(&mut cache, orders);
        assert_eq!(look(&mut cache, &tree), (vec![Some("4C53".to_owned())], vec![]));
    }

    #[test]
    fn strings_are_read_again_after_authorization_and_the_old_ones_hold_until_then() {
        let (tree, mut cache) = (Tree::new(), StringCache::default());
        let directory = tree.plug("1-1", 3);
        let (_, orders) = look(&mut cache, &tree);
        carry_out(&mut cache, orders);
        put(&directory, "serial", "other\n");
        assert_eq!(look(&mut cache, &tree), (vec![Some("4C53".to_owned())], vec![]));
        put(&directory, "authorized", "0\n");
        let (there, orders) = look(&mut cache, &tree);
        assert_eq!(there, [Some("4C53".to_owned())]);
        carry_out(&mut cache, orders);
        assert_eq!(look(&mut cache, &tree), (vec![Some("other".to_owned())], vec![]));
    }

    #[test]
    fn device_that_a_former_run_gave_away_is_there_without_being_read() {
        let (tree, mut cache) = (Tree::new(), StringCache::default());
        let directory = tree.plug("1-1", 3);
        let given = tree.scan().devices.remove(0);
        put(&directory, "serial", "hangs\n");
        cache.recall(given.plug, given.facts.authorized, given.facts.strings());
        assert_eq!(look(&mut cache, &tree), (vec![Some("4C53".to_owned())], vec![]));
    }

    #[test]
    fn what_is_read_of_a_plug_in_that_left_is_forgotten() {
        let (tree, mut cache) = (Tree::new(), StringCache::default());
        tree.plug("1-1", 3);
        let (_, orders) = look(&mut cache, &tree);
        std::fs::remove_file(tree.path("bus/usb/devices/1-1")).unwrap();
        assert_eq!(look(&mut cache, &tree), (vec![], vec![]));
        carry_out(&mut cache, orders);
        assert!(cache.known.is_empty());
    }

    #[test]
    fn operator_is_told_once_of_a_device_that_is_late_and_once_that_it_came() {
        let (tree, mut cache) = (Tree::new(), StringCache::default());
        tree.plug("1-1", 3);
        let (_, mut orders) = look(&mut cache, &tree);
        assert_eq!((cache.deadline(), cache.late(NOW)), (Some(NOW + PATIENCE), vec![]));
        let later = NOW + PATIENCE;
        assert_eq!((cache.late(later).len(), cache.late(later).len()), (1, 0));
        assert_eq!((cache.deadline(), cache.silent()), (None, 1));
        let order = orders.remove(0);
        let strings = read_strings(&order.plug);
        assert_eq!(cache.arrived(later, order, strings), Some(PATIENCE));
        assert_eq!(cache.silent(), 0);
    }
}
