//! Definitions of metrics. One expression gives a metric its name, help,
//! labels, buckets and handles. Each value of a label has a handle from the
//! start: nothing is looked up later, so no count can be lost.

use std::marker::PhantomData;

use metrics::{Counter, Gauge, Histogram, Key, KeyName, Label, Level, Metadata, Recorder, Unit};

/// Kind of a metric, as Prometheus calls it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MetricKind {
    Counter,
    Gauge,
    Histogram,
}

impl MetricKind {
    /// Name of the kind in the exposition format.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

/// Definition of a metric, for documentation and checks.
#[derive(Debug, Clone)]
pub struct MetricDefinition {
    pub name: &'static str,
    pub kind: MetricKind,
    pub help: &'static str,
    /// Names of the metric's labels.
    pub labels: &'static [&'static str],
    /// Upper bounds of a histogram's buckets; none for other kinds.
    pub buckets: Vec<f64>,
}

/// Type whose finitely many values are the values of a metric's labels.
pub(crate) trait LabelSet: Copy + 'static {
    /// Names of the labels.
    const LABELS: &'static [&'static str];

    /// Number of values.
    const COUNT: usize;

    /// Returns all values, in the order of their indexes.
    fn all() -> Vec<Self>;

    /// Returns the index of the value in [`LabelSet::all`].
    fn index(self) -> usize;

    /// Returns the value of each label.
    fn values(self) -> Vec<&'static str>;
}

/// Pairs of two labels.
impl<A: LabelSet, B: LabelSet> LabelSet for (A, B) {
    const LABELS: &'static [&'static str] = &{
        assert!(A::LABELS.len() == 1 && B::LABELS.len() == 1);
        [A::LABELS[0], B::LABELS[0]]
    };
    const COUNT: usize = A::COUNT * B::COUNT;

    fn all() -> Vec<Self> {
        let pairs = |a| B::all().into_iter().map(move |b| (a, b));
        A::all().into_iter().flat_map(pairs).collect()
    }

    fn index(self) -> usize {
        self.0.index() * B::COUNT + self.1.index()
    }

    fn values(self) -> Vec<&'static str> {
        [self.0.values(), self.1.values()].concat()
    }
}

/// Handles of one metric, one handle per value of its labels.
pub(super) struct Family<L, H> {
    handles: Vec<H>,
    labels: PhantomData<L>,
}

impl<L: LabelSet, H> Family<L, H> {
    /// Returns the handle of a value.
    pub(super) fn of(&self, label: L) -> &H {
        &self.handles[label.index()]
    }
}

/// Metric whose label values are known only while the worker runs, such as
/// devices. Each series begins with its first value.
pub(super) struct LateMetric {
    name: &'static str,
    labels: &'static [&'static str],
}

impl LateMetric {
    fn key(&self, values: &[&str]) -> Key {
        let labels = self.labels.iter().zip(values);
        let labels = labels.map(|(&name, value)| Label::new(name, (*value).to_owned()));
        Key::from_parts(self.name, labels.collect::<Vec<_>>())
    }

    pub(super) fn counter(&self, recorder: &dyn Recorder, values: &[&str]) -> Counter {
        recorder.register_counter(&self.key(values), &METADATA)
    }

    pub(super) fn gauge(&self, recorder: &dyn Recorder, values: &[&str]) -> Gauge {
        recorder.register_gauge(&self.key(values), &METADATA)
    }

    pub(super) fn histogram(&self, recorder: &dyn Recorder, values: &[&str]) -> Histogram {
        recorder.register_histogram(&self.key(values), &METADATA)
    }
}

const METADATA: Metadata<'static> = Metadata::new("imagegpt", Level::INFO, Some(module_path!()));

/// Label of metrics that have one series per device.
const DEVICE: &[&str] = &["device"];

/// Returns the buckets of durations, in seconds: powers of two from 15
/// microseconds to 4 minutes. Stages differ by six orders of magnitude between
/// a 2 KiB token request on a GPU and a batch of imagegpt-large on a CPU, and a
/// factor of two locates a change well enough.
pub(super) fn durations() -> Vec<f64> {
    (0..25)
        .map(|exponent| 15e-6 * f64::from(1 << exponent))
        .collect()
}

/// Maker of handles in one recorder, which also collects the definitions of the
/// metrics.
pub(super) struct Registry<'a> {
    recorder: &'a dyn Recorder,
    definitions: Vec<MetricDefinition>,
}

impl<'a> Registry<'a> {
    pub(super) fn new(recorder: &'a dyn Recorder) -> Self {
        Self {
            recorder,
            definitions: Vec::new(),
        }
    }

    /// Returns all definitions, sorted by name.
    pub(super) fn into_definitions(mut self) -> Vec<MetricDefinition> {
        self.definitions.sort_by_key(|definition| definition.name);
        self.definitions
    }

    fn define(
        &mut self,
        kind: MetricKind,
        name: &'static str,
        help: &'static str,
        labels: &'static [&'static str],
        buckets: Vec<f64>,
    ) {
        let key = KeyName::from_const_str(name);
        let unit = name.ends_with("_seconds").then_some(Unit::Seconds);
        match kind {
            MetricKind::Counter => self.recorder.describe_counter(key, None, help.into()),
            MetricKind::Gauge => self.recorder.describe_gauge(key, None, help.into()),
            MetricKind::Histogram => {
                let unit = unit.unwrap_or(Unit::Count);
                self.recorder
                    .describe_histogram(key, Some(unit), help.into());
            }
        }
        self.definitions.push(MetricDefinition {
            name,
            kind,
            help,
            labels,
            buckets,
        });
    }

    fn key<L: LabelSet>(name: &'static str, label: L) -> Key {
        let labels = L::LABELS.iter().zip(label.values());
        let labels = labels.map(|(&name, value)| Label::from_static_parts(name, value));
        Key::from_parts(name, labels.collect::<Vec<_>>())
    }

    fn family<L: LabelSet, H>(name: &'static str, make: impl Fn(&Key) -> H) -> Family<L, H> {
        let labels = L::all().into_iter();
        Family {
            handles: labels.map(|label| make(&Self::key(name, label))).collect(),
            labels: PhantomData,
        }
    }

    /// Registers a counter with the value 0, so that its series is exported at
    /// once: a series that appears with its first event hides that event from
    /// `rate()`, and registering alone exports nothing.
    fn counter_at_zero(&self, key: &Key) -> Counter {
        let counter = self.recorder.register_counter(key, &METADATA);
        counter.increment(0);
        counter
    }

    fn gauge_at_zero(&self, key: &Key) -> Gauge {
        let gauge = self.recorder.register_gauge(key, &METADATA);
        gauge.set(0.0);
        gauge
    }

    pub(super) fn counter(&mut self, name: &'static str, help: &'static str) -> Counter {
        self.define(MetricKind::Counter, name, help, &[], Vec::new());
        self.counter_at_zero(&Key::from_static_name(name))
    }

    pub(super) fn counters<L: LabelSet>(
        &mut self,
        name: &'static str,
        help: &'static str,
    ) -> Family<L, Counter> {
        self.define(MetricKind::Counter, name, help, L::LABELS, Vec::new());
        Self::family(name, |key| self.counter_at_zero(key))
    }

    /// Defines a counter with one more label, whose values are known later. The
    /// series without a value of that label exist from the start, and do not
    /// have the label: to Prometheus, an empty label is none.
    pub(super) fn counters_and_late<L: LabelSet>(
        &mut self,
        name: &'static str,
        help: &'static str,
        labels: &'static [&'static str],
    ) -> (Family<L, Counter>, LateMetric) {
        self.define(MetricKind::Counter, name, help, labels, Vec::new());
        let family = Self::family(name, |key| self.counter_at_zero(key));
        (family, LateMetric { name, labels })
    }

    pub(super) fn gauge(&mut self, name: &'static str, help: &'static str) -> Gauge {
        self.define(MetricKind::Gauge, name, help, &[], Vec::new());
        self.gauge_at_zero(&Key::from_static_name(name))
    }

    pub(super) fn gauges<L: LabelSet>(
        &mut self,
        name: &'static str,
        help: &'static str,
    ) -> Family<L, Gauge> {
        self.define(MetricKind::Gauge, name, help, L::LABELS, Vec::new());
        Self::family(name, |key| self.gauge_at_zero(key))
    }

    pub(super) fn histogram(
        &mut self,
        name: &'static str,
        help: &'static str,
        buckets: Vec<f64>,
    ) -> Histogram {
        self.define(MetricKind::Histogram, name, help, &[], buckets);
        let key = Key::from_static_name(name);
        self.recorder.register_histogram(&key, &METADATA)
    }

    pub(super) fn histograms<L: LabelSet>(
        &mut self,
        name: &'static str,
        help: &'static str,
        buckets: Vec<f64>,
    ) -> Family<L, Histogram> {
        self.define(MetricKind::Histogram, name, help, L::LABELS, buckets);
        Self::family(name, |key| self.recorder.register_histogram(key, &METADATA))
    }

    /// Defines a gauge whose label values are known later.
    pub(super) fn late_gauge(
        &mut self,
        name: &'static str,
        help: &'static str,
        labels: &'static [&'static str],
    ) -> LateMetric {
        self.define(MetricKind::Gauge, name, help, labels, Vec::new());
        LateMetric { name, labels }
    }

    /// Defines a gauge with one series per device.
    pub(super) fn device_gauge(&mut self, name: &'static str, help: &'static str) -> LateMetric {
        self.late_gauge(name, help, DEVICE)
    }

    /// Defines a histogram with one series per device.
    pub(super) fn device_histogram(
        &mut self,
        name: &'static str,
        help: &'static str,
        buckets: Vec<f64>,
    ) -> LateMetric {
        self.define(MetricKind::Histogram, name, help, DEVICE, buckets);
        LateMetric {
            name,
            labels: DEVICE,
        }
    }
}
