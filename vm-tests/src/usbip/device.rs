//! The part that all devices have in common: standard requests, configuration, alternate settings, halted endpoints
//! (USB 2.0 §9.4, USB 3.2 §9.4).

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::model::{Model, Reply};
use super::wire::{Setup, Submit};

/// Standard request codes (USB 2.0 Table 9-4, USB 3.2 Table 9-5).
mod request {
    pub(super) const GET_STATUS: u8 = 0;
    pub(super) const CLEAR_FEATURE: u8 = 1;
    pub(super) const SET_FEATURE: u8 = 3;
    pub(super) const GET_DESCRIPTOR: u8 = 6;
    pub(super) const GET_CONFIGURATION: u8 = 8;
    pub(super) const SET_CONFIGURATION: u8 = 9;
    pub(super) const GET_INTERFACE: u8 = 10;
    pub(super) const SET_INTERFACE: u8 = 11;
    pub(super) const SET_SEL: u8 = 48;
    pub(super) const SET_ISOCH_DELAY: u8 = 49;
}

/// bmRequestType without direction: standard type and recipient.
const TO_DEVICE: u8 = 0;
const TO_INTERFACE: u8 = 1;
const TO_ENDPOINT: u8 = 2;

const ENDPOINT_HALT: u16 = 0;

/// A device with its state.
pub struct Device {
    model: Box<dyn Model>,
    configuration: u8,
    /// Interface to alternate setting.
    settings: BTreeMap<u8, u8>,
    /// Endpoints that exist now.
    active: BTreeSet<u8>,
    halted: BTreeSet<u8>,
    is_wakeup_enabled: bool,
    counters: Counters,
}

/// Of the standard part.
#[derive(Default)]
struct Counters {
    device_descriptor_reads: u64,
    set_configuration: u64,
    set_interface: u64,
    halts_cleared: u64,
    stalls: u64,
}

impl Device {
    /// A device that nobody has configured yet.
    pub fn new(model: Box<dyn Model>) -> Self {
        Self {
            model,
            configuration: 0,
            settings: BTreeMap::new(),
            active: BTreeSet::new(),
            halted: BTreeSet::new(),
            is_wakeup_enabled: false,
            counters: Counters::default(),
        }
    }

    /// What makes it special.
    pub fn model(&mut self) -> &mut dyn Model {
        self.model.as_mut()
    }

    /// Back to the state after power-on.
    pub fn lose_power(&mut self) {
        self.configuration = 0;
        self.settings.clear();
        self.active.clear();
        self.halted.clear();
        self.is_wakeup_enabled = false;
    }

    /// bConfigurationValue of the configuration in use, 0 for none.
    pub fn configuration(&self) -> u8 {
        self.configuration
    }

    /// Asks the device for its first reaction to a transfer that is not isochronous.
    pub fn start(&mut self, submit: &Submit) -> Reply {
        let reply = if submit.endpoint == 0 {
            self.model.control(&submit.setup, &submit.data)
        } else if !self.active.contains(&submit.address()) {
            // Nobody is there to answer.
            Reply::Broken
        } else if self.halted.contains(&submit.address()) {
            Reply::Stall
        } else if submit.is_in {
            self.model.read(submit.address(), submit.length as usize)
        } else {
            self.model.write(submit.address(), &submit.data)
        };
        self.finish(submit, reply)
    }

    /// Turns [`Reply::Standard`] into what the standard says, now.
    pub fn finish(&mut self, submit: &Submit, reply: Reply) -> Reply {
        let reply = if reply == Reply::Standard { self.standard(&submit.setup) } else { reply };
        if reply == Reply::Stall {
            self.counters.stalls += 1;
        }
        reply
    }

    /// Whether an endpoint belongs to the settings in use.
    pub fn has_endpoint(&self, address: u8) -> bool {
        self.active.contains(&address)
    }

    /// Counters of the standard part and of the model.
    pub fn statistics(&self) -> Value {
        let Counters { device_descriptor_reads, set_configuration, set_interface, halts_cleared, stalls } =
            self.counters;
        json!({
            "configuration": self.configuration,
            "settings": self.settings.iter().map(|(interface, setting)| json!([interface, setting])).collect::<Vec<_>>(),
            "device_descriptor_reads": device_descriptor_reads,
            "set_configuration": set_configuration,
            "set_interface": set_interface,
            "halts_cleared": halts_cleared,
            "stalls": stalls,
            "model": self.model.statistics(),
        })
    }

    fn standard(&mut self, setup: &Setup) -> Reply {
        let recipient = setup.request_type & 0x7f;
        let is_in = setup.request_type & 0x80 != 0;
        let [low, _] = setup.value.to_le_bytes();
        let [index, _] = setup.index.to_le_bytes();
        match (setup.request, recipient, is_in) {
            (request::GET_DESCRIPTOR, TO_DEVICE, true) => self.descriptor(setup),
            (request::GET_STATUS, TO_DEVICE, true) => {
                answer(setup, &[1 | u8::from(self.is_wakeup_enabled) << 1, 0])
            }
            (request::GET_STATUS, TO_INTERFACE, true) if self.settings.contains_key(&index) => {
                answer(setup, &[0, 0])
            }
            (request::GET_STATUS, TO_ENDPOINT, true) if self.is_endpoint(index) => {
                answer(setup, &[u8::from(self.halted.contains(&index)), 0])
            }
            (request::SET_FEATURE | request::CLEAR_FEATURE, _, false) => {
                self.feature(setup, recipient, index)
            }
            (request::GET_CONFIGURATION, TO_DEVICE, true) => answer(setup, &[self.configuration]),
            (request::SET_CONFIGURATION, TO_DEVICE, false) => self.configure(low),
            (request::GET_INTERFACE, TO_INTERFACE, true) => {
                self.settings.get(&index).map_or(Reply::Stall, |&setting| answer(setup, &[setting]))
            }
            (request::SET_INTERFACE, TO_INTERFACE, false) => self.choose(index, low),
            (request::SET_SEL | request::SET_ISOCH_DELAY, TO_DEVICE, false) => Reply::Done(Vec::new()),
            _ => Reply::Stall,
        }
    }

    fn descriptor(&mut self, setup: &Setup) -> Reply {
        if setup.value == 0x0100 {
            self.counters.device_descriptor_reads += 1;
        }
        self.model.image().find(setup.value).map_or(Reply::Stall, |bytes| answer(setup, bytes))
    }

    fn is_endpoint(&self, address: u8) -> bool {
        address & 0x7f == 0 || self.active.contains(&address)
    }

    fn feature(&mut self, setup: &Setup, recipient: u8, index: u8) -> Reply {
        let is_set = setup.request == request::SET_FEATURE;
        match (recipient, setup.value) {
            (TO_DEVICE, 1) => self.is_wakeup_enabled = is_set,
            // U1, U2 and function suspend: the link has no states here.
            (TO_DEVICE, 48 | 49) | (TO_INTERFACE, 0) => {}
            (TO_ENDPOINT, ENDPOINT_HALT) if self.active.contains(&index) && is_set => {
                self.halted.insert(index);
            }
            (TO_ENDPOINT, ENDPOINT_HALT) if self.active.contains(&index) => {
                self.counters.halts_cleared += 1;
                self.halted.remove(&index);
            }
            (TO_ENDPOINT, ENDPOINT_HALT) if self.is_endpoint(index) => {}
            _ => return Reply::Stall,
        }
        Reply::Done(Vec::new())
    }

    fn configure(&mut self, value: u8) -> Reply {
        let settings = self.model.image().settings(value);
        let is_known =
            value == 0 || self.model.image().configurations.iter().any(|bytes| bytes.get(5) == Some(&value));
        if !is_known {
            return Reply::Stall;
        }
        self.counters.set_configuration += 1;
        self.configuration = value;
        self.halted.clear();
        self.settings = settings.iter().map(|setting| (setting.interface, 0)).collect();
        self.refresh_endpoints();
        for interface in self.settings.keys() {
            self.model.setting_chosen(*interface, 0);
        }
        Reply::Done(Vec::new())
    }

    fn choose(&mut self, interface: u8, alternate: u8) -> Reply {
        let settings = self.model.image().settings(self.configuration);
        let wanted = settings.iter().find(|s| (s.interface, s.alternate) == (interface, alternate));
        let Some(wanted) = wanted else { return Reply::Stall };
        self.counters.set_interface += 1;
        for endpoint in &wanted.endpoints {
            self.halted.remove(endpoint);
        }
        self.settings.insert(interface, alternate);
        self.refresh_endpoints();
        self.model.setting_chosen(interface, alternate);
        Reply::Done(Vec::new())
    }

    fn refresh_endpoints(&mut self) {
        let all = self.model.image().settings(self.configuration);
        let chosen = all.into_iter().filter(|s| self.settings.get(&s.interface) == Some(&s.alternate));
        self.active = chosen.flat_map(|setting| setting.endpoints).collect();
        self.halted.retain(|address| self.active.contains(address));
    }
}

/// As many of `bytes` as the host asks for.
fn answer(setup: &Setup, bytes: &[u8]) -> Reply {
    Reply::Done(bytes[..bytes.len().min(usize::from(setup.length))].to_vec())
}
