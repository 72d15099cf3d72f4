//! Callers that the tokens file names: their limits, and their numbers and
//! labels, which outlive a reload of the file.

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use governor::clock::{Clock as _, DefaultClock};
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};

use crate::proto::Priority;
use crate::serve::capacity::{CapacityPool, CapacityShare};
use crate::serve::error::StageError;
use crate::serve::fair::CallerId;

/// Largest number of names that get a number and a label of their own while the
/// process lives: four files' worth of names. A file that is rewritten with new
/// names for ever must not make series and memory grow for ever.
const NAMES_MAX: usize = 1024;
/// Shortest wait for a caller's rate, so that no wait is a busy loop.
const WAIT_MIN: Duration = Duration::from_millis(1);

/// Rate of images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ImageRate {
    pub images: NonZeroU32,
    pub per: RatePeriod,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RatePeriod {
    Second,
    Minute,
    Hour,
}

impl RatePeriod {
    pub(crate) const ALL: [Self; 3] = [Self::Second, Self::Minute, Self::Hour];

    /// Unit of the period in the tokens file.
    #[must_use]
    pub(crate) fn unit(self) -> &'static str {
        match self {
            Self::Second => "s",
            Self::Minute => "m",
            Self::Hour => "h",
        }
    }

    fn seconds(self) -> u32 {
        match self {
            Self::Second => 1,
            Self::Minute => 60,
            Self::Hour => 3600,
        }
    }
}

impl std::fmt::Display for ImageRate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.images, self.per.unit())
    }
}

/// Options of a caller in the tokens file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct CallerOptions {
    /// Rate at which the caller may submit images.
    pub rate: Option<ImageRate>,
    /// Largest number of the caller's images in flight.
    pub in_flight: Option<NonZeroU32>,
    /// Class of the caller's calls.
    pub class: Option<Priority>,
}

/// Caller of a call: one that the tokens file names, or one without a name. All
/// callers without a name count as one. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Caller(Option<Arc<NamedCaller>>);

#[derive(Debug)]
struct NamedCaller {
    id: CallerId,
    name: Box<str>,
    /// True if the name is a label of metrics.
    is_counted: bool,
    options: CallerOptions,
    rate: Option<(ImageRate, DefaultDirectRateLimiter)>,
    in_flight: Option<CapacityPool>,
}

impl Caller {
    #[must_use]
    pub(crate) fn id(&self) -> CallerId {
        self.0
            .as_ref()
            .map_or(CallerId::UNNAMED, |caller| caller.id)
    }

    /// Returns the caller's name; empty for a caller without one.
    #[must_use]
    pub(crate) fn name(&self) -> &str {
        self.0.as_ref().map_or("", |caller| &caller.name)
    }

    /// Returns the caller's label in metrics; empty for a caller without a
    /// name, and for a name that came after too many others.
    #[must_use]
    pub(crate) fn label(&self) -> &str {
        match &self.0 {
            Some(caller) if caller.is_counted => &caller.name,
            _ => "",
        }
    }

    /// Returns the class of a call for which its metadata asks for `asked`, and
    /// whose method has the class `of_method`.
    #[must_use]
    pub(crate) fn class(&self, asked: Option<Priority>, of_method: Priority) -> Priority {
        let of_caller = self.0.as_ref().and_then(|caller| caller.options.class);
        match of_caller {
            Some(Priority::Bulk) => Priority::Bulk,
            of_caller => asked.or(of_caller).unwrap_or(of_method),
        }
    }

    /// Charges `n` images to the caller's rate.
    ///
    /// # Errors
    ///
    /// [`StageError::CallerLimit`] if the rate does not allow them now.
    pub(crate) fn charge(&self, n: usize) -> Result<(), StageError> {
        let Some((caller, (limit, rate))) = self.rate() else {
            return Ok(());
        };
        let Some(n) = u32::try_from(n).ok().and_then(NonZeroU32::new) else {
            return Ok(());
        };
        match rate.check_n(n) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(not_until)) => {
                let wait = not_until.wait_time_from(DefaultClock::default().now());
                Err(caller.over("rate", limit, wait))
            }
            // The burst is at least the largest call.
            Err(burst) => Err(caller.never(n.get().into(), burst.0.into())),
        }
    }

    /// Charges one image to the caller's rate, once the rate allows it.
    pub(crate) async fn charge_when_due(&self) {
        let Some((_, (_, rate))) = self.rate() else {
            return;
        };
        while let Err(not_until) = rate.check() {
            let wait = not_until.wait_time_from(DefaultClock::default().now());
            tokio::time::sleep(wait.max(WAIT_MIN)).await;
        }
    }

    fn rate(&self) -> Option<(&NamedCaller, &(ImageRate, DefaultDirectRateLimiter))> {
        let caller = self.0.as_deref()?;
        Some((caller, caller.rate.as_ref()?))
    }

    /// Takes `n` images of the caller's own limit on images in flight; an empty
    /// share if the caller has no limit. `retry_after` gives the retry delay by
    /// the number of images in flight.
    ///
    /// # Errors
    ///
    /// [`StageError::CallerLimit`] if there is no room now,
    /// [`StageError::CallerNeverFits`] if there never is.
    pub(crate) fn try_hold(
        &self,
        n: usize,
        retry_after: impl Fn(usize) -> Duration,
    ) -> Result<CapacityShare, StageError> {
        let Some((caller, pool)) = self.in_flight() else {
            return Ok(CapacityShare::default());
        };
        if n > pool.size() {
            return Err(caller.never(n as u64, pool.size() as u64));
        }
        pool.try_take(Priority::Interactive, n).map_err(|_| {
            let retry_after = retry_after(pool.taken());
            caller.over("in-flight", &pool.size(), retry_after)
        })
    }

    /// Takes one image of the caller's own limit on images in flight, once it
    /// is free.
    pub(crate) async fn hold(&self) -> CapacityShare {
        match self.in_flight() {
            Some((_, pool)) => pool.take(Priority::Interactive, 1).await,
            None => CapacityShare::default(),
        }
    }

    fn in_flight(&self) -> Option<(&NamedCaller, &CapacityPool)> {
        let caller = self.0.as_deref()?;
        Some((caller, caller.in_flight.as_ref()?))
    }
}

impl NamedCaller {
    fn new(id: CallerId, name: &str, is_counted: bool, given: &GivenOptions) -> Self {
        let options = given.options;
        let rate = options.rate.map(|rate| {
            let burst = given.burst(rate);
            (rate, RateLimiter::direct(quota(rate).allow_burst(burst)))
        });
        let in_flight = options.in_flight;
        Self {
            id,
            name: name.into(),
            is_counted,
            options,
            rate,
            in_flight: in_flight.map(|max| CapacityPool::new(max.get() as usize, 0)),
        }
    }

    /// Makes the error of a call over one of the caller's own limits.
    fn over(
        &self,
        option: &'static str,
        limit: &dyn std::fmt::Display,
        retry_after: Duration,
    ) -> StageError {
        StageError::CallerLimit {
            caller: self.name.clone(),
            limit: format!("{option}={limit}"),
            retry_after,
        }
    }

    fn never(&self, given: u64, max: u64) -> StageError {
        StageError::CallerNeverFits {
            caller: self.name.clone(),
            given,
            max,
        }
    }
}

/// Returns the quota of a rate, whose period is at least a microsecond: the
/// tokens file bounds the images of a rate.
fn quota(rate: ImageRate) -> Quota {
    match rate.per {
        RatePeriod::Second => Quota::per_second(rate.images),
        RatePeriod::Minute => Quota::per_minute(rate.images),
        RatePeriod::Hour => Quota::per_hour(rate.images),
    }
}

/// Options of a caller, with what they need to know of the worker.
#[derive(Debug, Clone, Copy)]
struct GivenOptions {
    options: CallerOptions,
    call_images_max: NonZeroU32,
}

impl GivenOptions {
    /// Images that a caller who was idle may submit at once: those of a second,
    /// and at least the largest call, so that no call is impossible.
    fn burst(&self, rate: ImageRate) -> NonZeroU32 {
        let of_a_second = rate.images.get() / rate.per.seconds();
        let of_a_second = NonZeroU32::new(of_a_second).unwrap_or(NonZeroU32::MIN);
        of_a_second.max(self.call_images_max)
    }
}

/// Callers of all tokens files that were in force, so that numbers and labels
/// stay with the names, and the state of limits with callers that did not
/// change.
#[derive(Debug)]
pub(crate) struct CallerRegistry {
    /// Images of the largest call.
    call_images_max: NonZeroU32,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    /// Callers of the file that is in force.
    callers: HashMap<Box<str>, Caller>,
    /// Numbers of the names that are counted, for good.
    numbers: HashMap<Box<str>, CallerId>,
    last_number: u32,
}

impl CallerRegistry {
    #[must_use]
    pub(crate) fn new(call_images_max: u32) -> Self {
        Self {
            call_images_max: NonZeroU32::new(call_images_max).unwrap_or(NonZeroU32::MIN),
            known: Mutex::default(),
        }
    }

    /// Replaces the callers by those of a file that comes into force, and
    /// returns them in the order given.
    pub(crate) fn replace(&self, named: &[(&str, CallerOptions)]) -> Vec<Caller> {
        // Nothing below can panic halfway through a change.
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let before = std::mem::take(&mut known.callers);
        let callers: Vec<Caller> = named
            .iter()
            .map(|&(name, options)| match before.get(name) {
                Some(caller) if caller.options() == options => caller.clone(),
                before => known.caller(name, before, self.given(options)),
            })
            .collect();
        let all = callers.iter().map(|caller| (caller.name().into(), caller));
        known.callers = all.map(|(name, caller)| (name, caller.clone())).collect();
        callers
    }

    fn given(&self, options: CallerOptions) -> GivenOptions {
        GivenOptions {
            options,
            call_images_max: self.call_images_max,
        }
    }
}

impl Caller {
    fn options(&self) -> CallerOptions {
        self.0
            .as_ref()
            .map_or_else(CallerOptions::default, |caller| caller.options)
    }
}

impl Known {
    /// Makes a caller that is new, or whose options have changed.
    fn caller(&mut self, name: &str, before: Option<&Caller>, given: GivenOptions) -> Caller {
        let known = self.numbers.get(name).copied();
        let id = known.or(before.map(Caller::id)).unwrap_or_else(|| {
            self.last_number += 1;
            CallerId(self.last_number)
        });
        let is_counted = known.is_some() || self.numbers.len() < NAMES_MAX;
        if is_counted {
            self.numbers.insert(name.into(), id);
        } else if before.is_none() {
            tracing::warn!(
                name,
                max = NAMES_MAX,
                "the tokens files of this process have named more callers than metrics have \
                 labels for: the calls of this one are counted without its name"
            );
        }
        Caller(Some(Arc::new(NamedCaller::new(
            id, name, is_counted, &given,
        ))))
    }
}

#[cfg(test)]
impl Caller {
    /// Returns a caller with these options, whose largest call has one image.
    pub(crate) fn with(name: &str, options: CallerOptions) -> Self {
        let registry = CallerRegistry::new(1);
        registry
            .replace(&[(name, options)])
            .pop()
            .unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn n(number: u32) -> NonZeroU32 {
        NonZeroU32::new(number).expect("not zero")
    }

    fn rate(images: u32, per: RatePeriod) -> CallerOptions {
        CallerOptions {
            rate: Some(ImageRate {
                images: n(images),
                per,
            }),
            ..Default::default()
        }
    }

    #[test]
    fn a_rate_allows_a_burst_and_says_when_it_allows_more() {
        let registry = CallerRegistry::new(4);
        let hourly = rate(2, RatePeriod::Hour);
        let caller = &registry.replace(&[("ours", hourly)])[0];
        caller.charge(0).expect("nothing");
        caller.charge(3).expect("within the burst of a call");
        caller.charge(1).expect("the rest of the burst");
        let error = caller.charge(2).expect_err("an hour's worth");
        let StageError::CallerLimit { retry_after, .. } = &error else {
            panic!("{error:?}");
        };
        let seconds = retry_after.as_secs_f64();
        assert!((3590.0..=3600.0).contains(&seconds), "{seconds}");
        let text = error.to_string();
        assert!(
            text.starts_with("the caller \"ours\" is over its limit rate=2/h"),
            "{text}"
        );
        // A refused call is not charged.
        assert!(caller.charge(1).is_err());
        let error = caller.charge(5).expect_err("over the burst");
        assert!(matches!(error, StageError::CallerNeverFits { .. }));
        // A second's worth is the burst if it is more.
        let fast = &registry.replace(&[("ours", rate(100, RatePeriod::Second))])[0];
        fast.charge(100).expect("a second's worth");
        assert!(fast.charge(100).is_err());
    }

    #[tokio::test]
    async fn an_image_waits_until_the_rate_allows_it() {
        let caller = Caller::with("ours", rate(100, RatePeriod::Second));
        let started = std::time::Instant::now();
        for _ in 0..120 {
            caller.charge_when_due().await;
        }
        let elapsed = started.elapsed();
        assert!(elapsed >= Duration::from_millis(190), "{elapsed:?}");
        Caller::default().charge_when_due().await;
    }

    #[test]
    fn images_in_flight_are_limited_and_come_back() {
        let options = CallerOptions {
            in_flight: Some(n(3)),
            ..Default::default()
        };
        let caller = Caller::with("ours", options);
        let retry_after = |held| Duration::from_secs(held as u64);
        let held = caller.try_hold(2, retry_after).expect("room");
        let error = caller.try_hold(2, retry_after).expect_err("no room");
        assert_eq!(
            error.to_string(),
            "the caller \"ours\" is over its limit in-flight=3 (--auth-tokens-file); retry after \
             2s"
        );
        assert!(matches!(
            caller.try_hold(4, retry_after),
            Err(StageError::CallerNeverFits {
                given: 4,
                max: 3,
                ..
            })
        ));
        drop(held);
        assert!(caller.try_hold(3, retry_after).is_ok());
        let unlimited = Caller::default().try_hold(1_000_000, retry_after);
        assert_eq!(unlimited.expect("no limit").size(), 0);
    }

    #[test]
    fn the_class_of_a_caller_stands_above_its_method_and_bulk_above_all() {
        use Priority::{Bulk, Interactive};
        let of = |class| {
            let options = CallerOptions {
                class,
                ..Default::default()
            };
            Caller::with("ours", options)
        };
        for (caller, asked, of_method, expected) in [
            (None, None, Bulk, Bulk),
            (None, Some(Interactive), Bulk, Interactive),
            (Some(Bulk), Some(Interactive), Interactive, Bulk),
            (Some(Bulk), None, Interactive, Bulk),
            (Some(Interactive), None, Bulk, Interactive),
            (Some(Interactive), Some(Bulk), Interactive, Bulk),
        ] {
            assert_eq!(of(caller).class(asked, of_method), expected, "{caller:?}");
        }
    }

    #[test]
    fn a_reload_keeps_numbers_and_the_state_of_what_did_not_change() {
        let registry = CallerRegistry::new(1);
        let slow = rate(1, RatePeriod::Hour);
        let first = registry.replace(&[("a", slow), ("b", slow)]);
        first[0].charge(1).expect("the burst");
        first[1].charge(1).expect("the burst");
        let second = registry.replace(&[("b", rate(2, RatePeriod::Hour)), ("a", slow)]);
        assert_eq!(second[1].id(), first[0].id());
        assert_eq!(second[0].id(), first[1].id());
        assert!(
            second[1].charge(1).is_err(),
            "its rate is used up as before"
        );
        second[0].charge(1).expect("its rate is another one");
        // A name that was away has its number again.
        registry.replace(&[]);
        let third = registry.replace(&[("a", slow)]);
        assert_eq!(third[0].id(), first[0].id());
    }

    #[test]
    fn names_beyond_the_limit_have_no_label() {
        let registry = CallerRegistry::new(1);
        for idx in 0..NAMES_MAX {
            let name = format!("caller-{idx}");
            let made = registry.replace(&[(name.as_str(), CallerOptions::default())]);
            assert_eq!(made[0].label(), name);
        }
        let late = registry.replace(&[("late", CallerOptions::default())]);
        assert_eq!((late[0].label(), late[0].name()), ("", "late"));
        let again = registry.replace(&[("caller-0", CallerOptions::default())]);
        assert_eq!(again[0].label(), "caller-0");
        let known = registry.known.lock().expect("no panic");
        assert_eq!(known.numbers.len(), NAMES_MAX);
    }
}
