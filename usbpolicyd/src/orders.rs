//! Operators' orders: this device to that VM, or to none, for a while or for good. Guards and denies stand above them.
//!
//! Orders for one plug-in live in `/run`; lasting ones in a TOML file that people can read and delete. Both are replaced
//! in one step; a file that cannot be read is set aside, and there are no orders then.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use common::ids::VendorProduct;
use serde::{Deserialize, Serialize};

use crate::admin::wire::{Lasting, OrderView};
use crate::facts::DeviceFacts;
use crate::policy::decide::Order;
use crate::sysfs::{Plug, Present};
use crate::topology::PortAddress;

/// Largest file that is read.
const FILE_MAX: u64 = 1 << 20;
/// Most orders of each kind.
const ORDERS_MAX: usize = 1000;

/// An order cannot be kept.
#[derive(Debug, thiserror::Error)]
pub enum OrderError {
    /// Too many already.
    #[error("there are {ORDERS_MAX} orders already; take some back with `usbpolicyctl clear`")]
    TooMany,
    /// The file cannot be written.
    #[error("cannot write {path}")]
    Write {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Which device an order is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Target {
    /// This plug-in.
    Plug {
        /// Its directory.
        syspath: PathBuf,
        /// Inode of that.
        inode: u64,
    },
    /// Any device like this at this socket: two devices without serial number are not mistaken for each other.
    Device {
        /// Halves of the socket.
        connector: Vec<PortAddress>,
        id: VendorProduct,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        serial: Option<String>,
    },
}

/// One order with all that belongs to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Given {
    time: u64,
    lasting: Lasting,
    order: Order,
    device: Target,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Content {
    #[serde(default)]
    orders: Vec<Given>,
}

/// All orders in force.
#[derive(Debug)]
pub struct Orders {
    volatile: PathBuf,
    lasting: PathBuf,
    given: Vec<Given>,
}

impl Orders {
    /// Reads what is in force: from `state_dir` for plug-ins, from `order_dir` for good.
    pub fn open(state_dir: &Path, order_dir: &Path) -> Self {
        let (volatile, lasting) = (state_dir.join("orders.toml"), order_dir.join("overrides.toml"));
        let mut given = load(&volatile);
        given.extend(load(&lasting));
        given.truncate(2 * ORDERS_MAX);
        Self { volatile, lasting, given }
    }

    /// The order for a device: one for this plug-in goes before one for good.
    pub fn of(&self, present: &Present) -> Option<&Order> {
        let for_plug = |given: &&Given| given.device.is_plug(&present.plug);
        let for_device = |given: &&Given| given.device.is_device(&present.facts);
        let found = self.given.iter().find(for_plug).or_else(|| self.given.iter().find(for_device));
        found.map(|given| &given.order)
    }

    /// Gives an order in place of those that the device has.
    pub fn give(&mut self, present: &Present, order: Order, lasting: Lasting) -> Result<(), OrderError> {
        let mut given = self.given.clone();
        given.retain(|one| !one.device.is_for(present));
        if given.len() >= ORDERS_MAX {
            return Err(OrderError::TooMany);
        }
        let facts = &present.facts;
        let device = match lasting {
            Lasting::Once | Lasting::UntilUnplug => {
                Target::Plug { syspath: present.plug.syspath.clone(), inode: present.plug.inode }
            }
            Lasting::Persist => Target::Device {
                connector: facts.connector.halves.iter().cloned().collect(),
                id: facts.id,
                serial: facts.serial.clone(),
            },
        };
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        given.push(Given { time, lasting, order, device });
        self.replace(given)
    }

    /// Takes back the orders for a device. Says how many there were.
    pub fn clear(&mut self, present: &Present) -> Result<usize, OrderError> {
        self.keep(|one| !one.device.is_for(present))
    }

    /// Takes back all orders.
    pub fn clear_all(&mut self) -> Result<usize, OrderError> {
        self.keep(|_| false)
    }

    /// A VM no longer has this plug-in: orders for once are done.
    pub fn left(&mut self, plug: &Plug) -> Result<usize, OrderError> {
        self.keep(|one| one.lasting != Lasting::Once || !one.device.is_plug(plug))
    }

    /// Forgets orders for plug-ins that are gone.
    pub fn tidy<'a>(
        &mut self,
        present: impl Iterator<Item = &'a Present> + Clone,
    ) -> Result<usize, OrderError> {
        self.keep(|one| match &one.device {
            Target::Plug { .. } => present.clone().any(|present| one.device.is_plug(&present.plug)),
            Target::Device { .. } => true,
        })
    }

    fn keep(&mut self, stays: impl Fn(&Given) -> bool) -> Result<usize, OrderError> {
        let given: Vec<Given> = self.given.iter().filter(|one| stays(one)).cloned().collect();
        let fewer = self.given.len().saturating_sub(given.len());
        if fewer > 0 {
            self.replace(given)?;
        }
        Ok(fewer)
    }

    /// Writes the new orders; only then they are in force.
    fn replace(&mut self, given: Vec<Given>) -> Result<(), OrderError> {
        let is_lasting = |one: &&Given| one.lasting == Lasting::Persist;
        let part = |lasting: bool, of: &[Given]| {
            of.iter().filter(|one| is_lasting(one) == lasting).cloned().collect::<Vec<_>>()
        };
        for (path, lasting) in [(&self.volatile, false), (&self.lasting, true)] {
            let orders = part(lasting, &given);
            if orders != part(lasting, &self.given) {
                store(path, &Content { orders }, lasting)
                    .map_err(|source| OrderError::Write { path: path.clone(), source })?;
            }
        }
        self.given = given;
        Ok(())
    }

    /// All of them, for display.
    pub fn views(&self) -> Vec<OrderView> {
        let view = |one: &Given| {
            let (vm, actor) = match &one.order {
                Order::Attach { vm, actor } => (Some(vm.clone()), actor.clone()),
                Order::Keep { actor } => (None, actor.clone()),
            };
            OrderView { device: one.device.to_string(), vm, lasting: one.lasting, actor, time: one.time }
        };
        self.given.iter().map(view).collect()
    }
}

impl Target {
    fn is_plug(&self, plug: &Plug) -> bool {
        matches!(self, Self::Plug { syspath, inode } if *syspath == plug.syspath && *inode == plug.inode)
    }

    fn is_device(&self, facts: &DeviceFacts) -> bool {
        matches!(self, Self::Device { connector, id, serial }
            if *id == facts.id && *serial == facts.serial
                && connector.iter().any(|half| facts.connector.halves.contains(half)))
    }

    fn is_for(&self, present: &Present) -> bool {
        self.is_plug(&present.plug) || self.is_device(&present.facts)
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Plug { syspath, .. } => {
                let name = syspath.file_name().unwrap_or_default().to_string_lossy();
                write!(f, "{name}, as it is plugged in now")
            }
            Self::Device { connector, id, serial } => {
                write!(f, "{id}")?;
                if let Some(serial) = serial {
                    write!(f, " SN {}", serial.escape_debug())?;
                }
                connector.first().map_or(Ok(()), |half| write!(f, " at {half}"))
            }
        }
    }
}

fn load(path: &Path) -> Vec<Given> {
    let read = || -> io::Result<Content> {
        let mut text = String::new();
        fs::File::open(path)?.take(FILE_MAX).read_to_string(&mut text)?;
        toml::from_str(&text).map_err(io::Error::other)
    };
    match read() {
        Ok(content) => content.orders,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => {
            let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
            let aside = path.with_extension(format!("toml.corrupt-{time}"));
            let moved = fs::rename(path, &aside).is_ok();
            let error = error.to_string().replace('\n', " ");
            tracing::error!(path = %path.display(), error, aside = %aside.display(), moved,
                "cannot read operators' orders; there are none now");
            Vec::new()
        }
    }
}

fn store(path: &Path, content: &Content, sync: bool) -> io::Result<()> {
    let text = toml::to_string(content).map_err(io::Error::other)?;
    let draft = path.with_extension("toml.new");
    let mut file = fs::File::create(&draft)?;
    file.write_all(b"# Orders of operators, written by usbpolicyd. `usbpolicyctl orders` shows them, `clear` takes them back.\n")?;
    file.write_all(text.as_bytes())?;
    if sync {
        file.sync_all()?;
    }
    fs::rename(&draft, path)?;
    if sync && let Some(directory) = path.parent() {
        fs::File::open(directory)?.sync_all()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sysfs::tests::Tree;

    fn keep() -> Order {
        Order::Keep { actor: "alice".into() }
    }

    fn attach() -> Order {
        Order::Attach { vm: "work".parse().unwrap(), actor: "bob".into() }
    }

    fn present(tree: &Tree, name: &str) -> Present {
        tree.plug(name, 3);
        tree.scan().devices.into_iter().find(|one| one.facts.sys_name == name).unwrap()
    }

    #[test]
    fn lasting_order_survives_a_restart_and_a_replug_at_the_same_socket_only() {
        let (tree, dir) = (Tree::new(), tempfile::tempdir().unwrap());
        let (here, there) = (present(&tree, "1-1"), present(&tree, "1-2"));
        Orders::open(dir.path(), dir.path()).give(&here, attach(), Lasting::Persist).unwrap();
        let orders = Orders::open(dir.path(), dir.path());
        let mut again = here;
        again.plug.inode += 1;
        assert_eq!((orders.of(&again), orders.of(&there)), (Some(&attach()), None));
    }

    #[test]
    fn order_for_a_plug_in_goes_first_and_ends_with_it() {
        let (tree, dir) = (Tree::new(), tempfile::tempdir().unwrap());
        let here = present(&tree, "1-1");
        let mut orders = Orders::open(dir.path(), dir.path());
        orders.give(&here, keep(), Lasting::UntilUnplug).unwrap();
        assert_eq!(orders.of(&here), Some(&keep()));
        assert_eq!(orders.tidy(std::iter::empty()).unwrap(), 1);
        assert_eq!(orders.of(&here), None);
    }

    #[test]
    fn order_for_once_ends_when_the_vm_no_longer_has_the_device() {
        let (tree, dir) = (Tree::new(), tempfile::tempdir().unwrap());
        let here = present(&tree, "1-1");
        let mut orders = Orders::open(dir.path(), dir.path());
        orders.give(&here, attach(), Lasting::Once).unwrap();
        orders.left(&here.plug).unwrap();
        assert_eq!(orders.of(&here), None);
    }

    #[test]
    fn corrupt_file_is_set_aside() {
        let (tree, dir) = (Tree::new(), tempfile::tempdir().unwrap());
        fs::write(dir.path().join("overrides.toml"), "[[orders").unwrap();
        let mut orders = Orders::open(dir.path(), dir.path());
        assert!(orders.views().is_empty());
        let names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|one| one.unwrap().file_name()).collect();
        assert!(names[0].to_string_lossy().starts_with("overrides.toml.corrupt-"), "{names:?}");
        orders.give(&present(&tree, "1-1"), keep(), Lasting::Persist).unwrap();
    }

    #[test]
    fn order_that_cannot_be_written_is_not_in_force() {
        let (tree, dir) = (Tree::new(), tempfile::tempdir().unwrap());
        let here = present(&tree, "1-1");
        let mut orders = Orders::open(dir.path(), &dir.path().join("missing"));
        assert!(orders.give(&here, keep(), Lasting::Persist).is_err());
        assert_eq!(orders.of(&here), None);
    }
}
