//! One test of one key of a match, ready to be made. The same test serves the decision and its explanation.

use std::fmt::{self, Write as _};

use common::ids::Speed;

use super::pattern::{ClassSet, Glob, IdPattern};
use crate::facts::{ConnectType, DeviceFacts, Fingerprint, Removable};
use crate::topology::{Connector, Controller, KernelName};

/// How specific a match is: a mask of what it names, compared as a number. Each bit counts once, however often the
/// match names such a thing, so that no heap of weak tests outweighs a strong one.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(transparent)]
pub struct Specificity(pub u8);

impl Specificity {
    /// A class, speed, name or other property.
    pub const PROPERTY: Self = Self(1);
    /// A controller, or a place with all below it.
    pub const SUBTREE: Self = Self(2);
    /// A vendor.
    pub const VENDOR: Self = Self(4);
    /// A product of a vendor; comes with [`Self::VENDOR`].
    pub const PRODUCT: Self = Self(8);
    /// One port.
    pub const PORT: Self = Self(16);
    /// A serial number or fingerprint.
    pub const UNIT: Self = Self(32);

    /// Both together.
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl fmt::Display for Specificity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What a place in a match has become.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Where {
    /// A connector. `complete` says that the kernel has told all its halves.
    Connector {
        /// The ports.
        connector: Connector,
        /// Whether no other port can be part of it.
        complete: bool,
    },
    /// A kernel name whose bus does not exist now. It fits a device of exactly that name.
    Kernel(KernelName),
}

/// A place in a match.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Where.
    pub at: Where,
    /// Whether all below is meant too.
    pub subtree: bool,
    /// As the operator wrote it.
    pub text: String,
}

impl Place {
    /// Whether the device is there.
    pub fn has(&self, device: &DeviceFacts) -> bool {
        match (&self.at, self.subtree) {
            (Where::Connector { connector, .. }, false) => connector.meets(&device.connector),
            (Where::Connector { connector, .. }, true) => connector.is_at_or_above(&device.connector),
            (Where::Kernel(name), subtree) => device.sys_name.parse::<KernelName>().is_ok_and(|here| {
                let (wanted, chain) = (name.chain.ports(), here.chain.ports());
                here.bus == name.bus && if subtree { chain.starts_with(wanted) } else { chain == wanted }
            }),
        }
    }

    /// What naming it is worth.
    pub const fn specificity(&self) -> Specificity {
        if self.subtree { Specificity::SUBTREE } else { Specificity::PORT }
    }
}

/// The test of one key. Of the values, one must fit; see [`super::schema::Match`] for each key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Condition {
    /// `id`.
    Id(Vec<IdPattern>),
    /// `at`.
    At(Vec<Place>),
    /// `controller`.
    Controller(Vec<Controller>),
    /// `depth`.
    Depth(Vec<u8>),
    /// `speed`.
    Speed(Vec<Speed>),
    /// `removable`.
    Removable(Vec<Removable>),
    /// `connect_type`.
    ConnectType(Vec<ConnectType>),
    /// `class`.
    Class(Vec<ClassSet>),
    /// `interfaces.any`.
    AnyInterface(Vec<ClassSet>),
    /// `interfaces.all`.
    AllInterfaces(Vec<ClassSet>),
    /// `interfaces.only`.
    OnlyInterfaces(Vec<ClassSet>),
    /// `interfaces.none`.
    NoInterface(Vec<ClassSet>),
    /// `interfaces.exactly`.
    ExactlyInterfaces(Vec<ClassSet>),
    /// `serial`.
    Serial(Vec<Glob>),
    /// `product`.
    Product(Vec<Glob>),
    /// `manufacturer`.
    Manufacturer(Vec<Glob>),
    /// `fingerprint`.
    Fingerprint(Vec<Fingerprint>),
}

impl Condition {
    /// Makes the test. None when the device does not fit, otherwise what this key is worth.
    pub fn test(&self, device: &DeviceFacts) -> Option<Specificity> {
        let property = |fits: bool| fits.then_some(Specificity::PROPERTY);
        match self {
            Self::Id(ids) => {
                ids.iter().filter(|id| id.matches(device.id)).map(|id| id_specificity(*id)).max()
            }
            Self::At(places) => places.iter().filter(|place| place.has(device)).map(Place::specificity).max(),
            Self::Controller(all) => all.contains(&device.controller).then_some(Specificity::SUBTREE),
            Self::Depth(all) => property(all.contains(&device.depth())),
            Self::Speed(all) => property(all.contains(&device.speed)),
            Self::Removable(all) => property(all.contains(&device.removable)),
            Self::ConnectType(all) => property(all.contains(&device.connect_type)),
            Self::Class(all) => property(all.iter().any(|set| set.matches(device.class))),
            Self::AnyInterface(sets) => property(sets.iter().any(|set| has_interface(device, set))),
            Self::AllInterfaces(sets) => property(sets.iter().all(|set| has_interface(device, set))),
            Self::OnlyInterfaces(sets) => property(only(device, sets)),
            Self::NoInterface(sets) => property(!sets.iter().any(|set| has_interface(device, set))),
            Self::ExactlyInterfaces(sets) => {
                property(only(device, sets) && sets.iter().all(|set| has_interface(device, set)))
            }
            Self::Serial(globs) => text_fits(globs, device.serial.as_deref()).then_some(Specificity::UNIT),
            Self::Product(globs) => property(text_fits(globs, device.product.as_deref())),
            Self::Manufacturer(globs) => property(text_fits(globs, device.manufacturer.as_deref())),
            Self::Fingerprint(all) => all.contains(&device.fingerprint()).then_some(Specificity::UNIT),
        }
    }

    /// What the key can be worth, depending on which value fits.
    pub fn possible(&self) -> Vec<Specificity> {
        match self {
            Self::Id(ids) => ids.iter().map(|id| id_specificity(*id)).collect(),
            Self::At(places) => places.iter().map(Place::specificity).collect(),
            Self::Controller(_) => vec![Specificity::SUBTREE],
            Self::Serial(_) | Self::Fingerprint(_) => vec![Specificity::UNIT],
            _ => vec![Specificity::PROPERTY],
        }
    }

    /// The key as the operator writes it.
    pub const fn key(&self) -> &'static str {
        match self {
            Self::Id(_) => "id",
            Self::At(_) => "at",
            Self::Controller(_) => "controller",
            Self::Depth(_) => "depth",
            Self::Speed(_) => "speed",
            Self::Removable(_) => "removable",
            Self::ConnectType(_) => "connect_type",
            Self::Class(_) => "class",
            Self::AnyInterface(_) => "interfaces.any",
            Self::AllInterfaces(_) => "interfaces.all",
            Self::OnlyInterfaces(_) => "interfaces.only",
            Self::NoInterface(_) => "interfaces.none",
            Self::ExactlyInterfaces(_) => "interfaces.exactly",
            Self::Serial(_) => "serial",
            Self::Product(_) => "product",
            Self::Manufacturer(_) => "manufacturer",
            Self::Fingerprint(_) => "fingerprint",
        }
    }

    /// What the key asks for, as a list for people.
    pub fn wanted(&self) -> String {
        match self {
            Self::Id(all) => joined(all),
            Self::At(all) => all.iter().map(|place| place.text.as_str()).collect::<Vec<_>>().join(", "),
            Self::Controller(all) => joined(all),
            Self::Depth(all) => joined(all),
            Self::Speed(all) => joined(all),
            Self::Removable(all) => all.iter().map(|one| removable_word(*one)).collect::<Vec<_>>().join(", "),
            Self::ConnectType(all) => all.iter().map(|one| connect_word(*one)).collect::<Vec<_>>().join(", "),
            Self::Class(all)
            | Self::AnyInterface(all)
            | Self::AllInterfaces(all)
            | Self::OnlyInterfaces(all)
            | Self::NoInterface(all)
            | Self::ExactlyInterfaces(all) => joined(all),
            Self::Serial(all) | Self::Product(all) | Self::Manufacturer(all) => joined(all),
            Self::Fingerprint(all) => joined(all),
        }
    }

    /// Why a device does not fit, for people. Not escaped: strings are the device's.
    pub fn misfit(&self, device: &DeviceFacts) -> String {
        let (found, wanted) = (self.found(device), self.wanted());
        match self {
            Self::At(places) if places.iter().any(|place| place.subtree) => {
                format!("{found} is not {wanted} nor below it")
            }
            Self::AnyInterface(_) => format!("{found}: none of {wanted}"),
            Self::AllInterfaces(_) => format!("{found}: not all of {wanted}"),
            Self::OnlyInterfaces(_) => format!("{found}: not only {wanted}"),
            Self::NoInterface(_) => format!("{found}: some of {wanted}"),
            Self::ExactlyInterfaces(_) => format!("{found}: not exactly {wanted}"),
            _ => format!("{found} is not {wanted}"),
        }
    }

    /// What the device has for this key. Not escaped: strings are the device's.
    pub fn found(&self, device: &DeviceFacts) -> String {
        match self {
            Self::Id(_) => device.id.to_string(),
            Self::At(_) => device.connector.to_string(),
            Self::Controller(_) => device.controller.to_string(),
            Self::Depth(_) => device.depth().to_string(),
            Self::Speed(_) => device.speed.to_string(),
            Self::Removable(_) => removable_word(device.removable).to_owned(),
            Self::ConnectType(_) => connect_word(device.connect_type).to_owned(),
            Self::Class(_) => device.class.to_string(),
            Self::AnyInterface(_)
            | Self::AllInterfaces(_)
            | Self::OnlyInterfaces(_)
            | Self::NoInterface(_)
            | Self::ExactlyInterfaces(_) => {
                let mut classes: Vec<_> = device.interfaces.iter().map(|one| one.class).collect();
                classes.sort_unstable();
                classes.dedup();
                if classes.is_empty() { "no interface".to_owned() } else { joined(&classes) }
            }
            Self::Serial(_) => device.serial.clone().unwrap_or_else(|| "none".to_owned()),
            Self::Product(_) => device.product.clone().unwrap_or_else(|| "none".to_owned()),
            Self::Manufacturer(_) => device.manufacturer.clone().unwrap_or_else(|| "none".to_owned()),
            Self::Fingerprint(_) => device.fingerprint().to_string(),
        }
    }
}

fn id_specificity(id: IdPattern) -> Specificity {
    match (id.vendor, id.product) {
        (Some(_), Some(_)) => Specificity::VENDOR.with(Specificity::PRODUCT),
        (Some(_), None) => Specificity::VENDOR,
        (None, _) => Specificity(0),
    }
}

fn has_interface(device: &DeviceFacts, set: &ClassSet) -> bool {
    device.interfaces.iter().any(|one| set.matches(one.class))
}

/// A device without any interface is not "only" anything.
fn only(device: &DeviceFacts, sets: &[ClassSet]) -> bool {
    !device.interfaces.is_empty()
        && device.interfaces.iter().all(|one| sets.iter().any(|set| set.matches(one.class)))
}

/// A device without the string does not fit, not even `*`.
fn text_fits(globs: &[Glob], text: Option<&str>) -> bool {
    text.is_some_and(|text| globs.iter().any(|glob| glob.matches(text)))
}

fn joined<T: fmt::Display>(all: &[T]) -> String {
    let mut text = String::new();
    for (index, one) in all.iter().enumerate() {
        if index > 0 {
            text.push_str(", ");
        }
        let _ = write!(text, "{one}");
    }
    text
}

/// The word a policy uses.
pub(super) const fn removable_word(value: Removable) -> &'static str {
    match value {
        Removable::Removable => "removable",
        Removable::Fixed => "fixed",
        Removable::Unknown => "unknown",
    }
}

/// The word a policy uses.
pub(super) const fn connect_word(value: ConnectType) -> &'static str {
    match value {
        ConnectType::Hotplug => "hotplug",
        ConnectType::Hardwired => "hardwired",
        ConnectType::NotUsed => "not-used",
        ConnectType::Unknown => "unknown",
    }
}
