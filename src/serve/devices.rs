//! State of each device, and the state of the worker that follows: the worker
//! is ready once all devices have loaded, and as long as one of them serves.

use std::sync::Arc;

use tokio::sync::watch;

use crate::engine::{EngineFactory, EngineFacts};
use crate::runtime::error::EngineError;
use crate::serve::metrics::Metrics;

/// Index of a worker's engine: its position in `--device-id`, counted from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct DeviceIdx(pub usize);

/// State of all engines of a worker together.
#[derive(Debug, Clone)]
pub enum WorkerState {
    /// Engines are loading and warming up.
    Loading,
    /// All engines were loaded, and at least one still serves.
    Ready(EngineFacts),
    /// All engines have ended in good order after the last batch.
    Stopped,
    /// An engine could not be loaded, or the last engine has ended before its
    /// time; the process should end too.
    Failed(WorkerFailure),
}

/// Reason why a worker cannot go on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct WorkerFailure {
    pub kind: FailureKind,
    pub reason: String,
}

/// Cause of a failure: the worker or the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureKind {
    /// One of the worker's own stages failed.
    Worker,
    /// The device, or the runtime on it, failed: a restart elsewhere may be
    /// better.
    Device,
}

/// Engine of a device, before it is loaded.
pub struct DeviceEngine {
    /// Device number, as in `--device-id`.
    pub id: i32,
    pub factory: EngineFactory,
}

impl std::fmt::Debug for DeviceEngine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DeviceEngine")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

/// State of one device of a worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceState {
    /// Device number, as in `--device-id`.
    pub id: i32,
    /// Facts that the device's engine reported once it was loaded.
    pub facts: Option<EngineFacts>,
    /// True if the device's engine takes no more work, for whatever reason.
    pub ended: bool,
}

impl DeviceState {
    /// True if the device's engine takes work.
    #[must_use]
    pub fn serves(&self) -> bool {
        self.facts.is_some() && !self.ended
    }
}

/// States of all devices of a worker, in the order of `--device-id`.
#[derive(Debug, Clone)]
pub struct DeviceStates {
    each: Vec<DeviceState>,
    /// Failure that has ended the worker: the first one, since later failures
    /// mostly follow from it.
    failure: Option<WorkerFailure>,
}

impl DeviceStates {
    /// Creates the states of devices that are not loaded yet.
    pub fn loading(ids: impl IntoIterator<Item = i32>) -> Self {
        let device = |id| DeviceState {
            id,
            facts: None,
            ended: false,
        };
        Self {
            each: ids.into_iter().map(device).collect(),
            failure: None,
        }
    }

    #[must_use]
    pub fn each(&self) -> &[DeviceState] {
        &self.each
    }

    /// Returns the failure that ends the worker, if there is one.
    #[must_use]
    pub fn failure(&self) -> Option<&WorkerFailure> {
        self.failure.as_ref()
    }

    /// Number of devices that serve.
    #[must_use]
    pub fn n_serving(&self) -> usize {
        self.each.iter().filter(|device| device.serves()).count()
    }

    /// Returns the state of the worker that follows from all devices.
    #[must_use]
    pub fn state(&self) -> WorkerState {
        if let Some(failure) = &self.failure {
            return WorkerState::Failed(failure.clone());
        }
        let loads = |device: &DeviceState| device.facts.is_none() && !device.ended;
        if self.each.iter().any(loads) {
            return WorkerState::Loading;
        }
        self.facts()
            .map_or(WorkerState::Stopped, WorkerState::Ready)
    }

    /// Facts of the serving devices together: all run the same graphs, and each
    /// has its own slots for sequences.
    fn facts(&self) -> Option<EngineFacts> {
        let serving = || self.each.iter().filter(|device| device.serves());
        let mut facts = serving().find_map(|device| device.facts.clone())?;
        if let Some(sequences) = &mut facts.sequences {
            sequences.n_slots = serving()
                .filter_map(|device| device.facts.as_ref()?.sequences)
                .map(|sequences| sequences.n_slots)
                .sum();
        }
        Some(facts)
    }

    pub(crate) fn loaded(&mut self, device: DeviceIdx, facts: &EngineFacts) {
        if let Some(device) = self.each.get_mut(device.0) {
            device.facts = Some(facts.clone());
        }
    }

    pub(crate) fn ended(&mut self, device: DeviceIdx) {
        if let Some(device) = self.each.get_mut(device.0) {
            device.ended = true;
        }
    }

    /// Records that a device has failed. The worker fails too if other devices
    /// still load, since a worker starts with all of its devices, or if no
    /// device is left.
    fn failed(&mut self, device: DeviceIdx, failure: WorkerFailure) {
        let loading = self.each.iter().any(|device| device.facts.is_none());
        self.ended(device);
        if loading || self.n_serving() == 0 {
            self.fail(failure);
        }
    }

    fn fail(&mut self, failure: WorkerFailure) {
        self.failure.get_or_insert(failure);
    }
}

/// Handle through which engines and stages report that they have loaded, ended
/// or failed.
#[derive(Debug, Clone)]
pub(crate) struct DeviceReports {
    devices: Arc<watch::Sender<DeviceStates>>,
    metrics: Metrics,
}

impl DeviceReports {
    pub(crate) fn new(
        ids: impl IntoIterator<Item = i32>,
        metrics: Metrics,
    ) -> (Self, watch::Receiver<DeviceStates>) {
        let (devices, seen) = watch::channel(DeviceStates::loading(ids));
        let devices = Arc::new(devices);
        let reports = Self { devices, metrics };
        reports.show();
        (reports, seen)
    }

    /// Reports that an engine is loaded and warm.
    pub(crate) fn loaded(&self, device: DeviceIdx, facts: &EngineFacts) {
        self.devices
            .send_modify(|devices| devices.loaded(device, facts));
        self.show();
    }

    /// Reports that an engine has ended in good order.
    pub(crate) fn ended(&self, device: DeviceIdx) {
        self.devices.send_modify(|devices| devices.ended(device));
        self.show();
    }

    /// Reports that an engine could not be loaded, or has ended before its
    /// time.
    pub(crate) fn failed(&self, device: DeviceIdx, error: &EngineError) {
        let kind = match error {
            EngineError::Device(_) => FailureKind::Device,
            _ => FailureKind::Worker,
        };
        let (mut id, mut n_left, reason) = (0, 0, error.to_string());
        self.devices.send_modify(|devices| {
            id = devices.each.get(device.0).map_or(0, |device| device.id);
            // A single device needs no name.
            let reason = match devices.each.len() {
                1 => reason.clone(),
                _ => format!("device {id}: {reason}"),
            };
            devices.failed(device, WorkerFailure { kind, reason });
            n_left = devices.n_serving();
        });
        self.show();
        tracing::error!(device = id, n_left, reason, "a device is out of service");
    }

    /// Reports that one of the worker's own parts has ended before its time.
    pub(crate) fn fail(&self, reason: String) {
        let kind = FailureKind::Worker;
        self.devices
            .send_modify(|devices| devices.fail(WorkerFailure { kind, reason }));
    }

    fn show(&self) {
        for device in &self.devices.borrow().each {
            self.metrics.device_up(device.id, device.serves());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::SequenceFacts;

    fn facts() -> EngineFacts {
        EngineFacts {
            provider: "fake",
            runtime_version: String::new(),
            dimension: 4,
            n_classes: 3,
            sequences: Some(SequenceFacts {
                n_slots: 4,
                slot_bytes: 1,
                chunk: 1,
                chunks_are_powers: false,
                rows_min: 2,
                shares_prefixes: false,
            }),
            fallbacks: Vec::new(),
            sizes_untried: false,
        }
    }

    fn reports() -> (DeviceReports, watch::Receiver<DeviceStates>) {
        DeviceReports::new([3, 5], Metrics::new().expect("metrics"))
    }

    const ONE: DeviceIdx = DeviceIdx(0);
    const OTHER: DeviceIdx = DeviceIdx(1);

    fn n_slots(devices: &watch::Receiver<DeviceStates>) -> Option<usize> {
        match devices.borrow().state() {
            WorkerState::Ready(facts) => facts.sequences.map(|sequences| sequences.n_slots),
            _ => None,
        }
    }

    fn gone(reason: &str) -> EngineError {
        EngineError::Device(reason.to_owned())
    }

    #[test]
    fn ready_once_all_have_loaded_and_while_one_serves() {
        let (reports, devices) = reports();
        reports.loaded(ONE, &facts());
        assert!(matches!(devices.borrow().state(), WorkerState::Loading));
        reports.loaded(OTHER, &facts());
        assert_eq!(n_slots(&devices), Some(8), "each has slots of its own");
        reports.failed(ONE, &gone("first"));
        assert_eq!(n_slots(&devices), Some(4));
        assert_eq!(devices.borrow().failure(), None);
        let page = reports.metrics.render();
        assert!(
            page.contains("imagegpt_device_up{device=\"3\"} 0"),
            "{page}"
        );
        assert!(
            page.contains("imagegpt_device_up{device=\"5\"} 1"),
            "{page}"
        );
        reports.failed(OTHER, &gone("second"));
        let failure = devices.borrow().failure().cloned().expect("none is left");
        assert_eq!(failure.kind, FailureKind::Device);
        assert!(failure.reason.starts_with("device 5: "), "{failure:?}");
        assert!(failure.reason.ends_with("second"), "{failure:?}");
    }

    #[test]
    fn a_worker_starts_with_all_of_its_devices_or_not_at_all() {
        let (reports, devices) = reports();
        reports.failed(OTHER, &EngineError::NotLoaded("no such device".to_owned()));
        reports.loaded(ONE, &facts());
        let WorkerState::Failed(failure) = devices.borrow().state() else {
            panic!("one is missing");
        };
        assert_eq!(failure.reason, "device 5: no such device");
    }

    #[test]
    fn engines_that_end_in_good_order_fail_nothing() {
        let (reports, devices) = reports();
        for device in [ONE, OTHER] {
            reports.loaded(device, &facts());
        }
        reports.ended(ONE);
        assert!(matches!(devices.borrow().state(), WorkerState::Ready(_)));
        reports.ended(OTHER);
        assert!(matches!(devices.borrow().state(), WorkerState::Stopped));
        reports.fail("the batcher thread panicked".to_owned());
        reports.fail("and so did another".to_owned());
        let failure = devices
            .borrow()
            .failure()
            .cloned()
            .expect("a stage has failed");
        assert!(failure.reason.contains("batcher"), "the first counts");
    }
}
