//! Splits of examples into training, validation and test.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng as _, SeedableRng as _};

use super::{ProbeError, ProbeTargets, real};

/// Part of a split.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SplitPart {
    Train,
    Validation,
    Test,
}

/// Shares of the examples that are no training, each from 0 on, together below 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SplitShares {
    pub validation: f64,
    pub test: f64,
}

/// Rows of each part, ascending.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ExampleSplit {
    pub train: Vec<usize>,
    pub validation: Vec<usize>,
    pub test: Vec<usize>,
}

impl ExampleSplit {
    /// Makes the split that gives each row its part.
    ///
    /// # Errors
    ///
    /// When the training part cannot be fitted
    /// ([`ProbeTargets::check_training`]), or the number of parts differs from that
    /// of the labels.
    pub fn given(parts: &[SplitPart], targets: &ProbeTargets) -> Result<Self, ProbeError> {
        if parts.len() != targets.n_rows() {
            return Err(ProbeError::Parts {
                parts: parts.len(),
                rows: targets.n_rows(),
            });
        }
        let rows_of = |wanted| {
            let rows = parts.iter().enumerate();
            let rows = rows.filter(|(_, part)| **part == wanted);
            rows.map(|(row, _)| row).collect()
        };
        let split = Self {
            train: rows_of(SplitPart::Train),
            validation: rows_of(SplitPart::Validation),
            test: rows_of(SplitPart::Test),
        };
        targets.check_training(&split.train)?;
        Ok(split)
    }

    /// Splits at random, with each class in each part by its share as far as its
    /// number allows. Where examples have several labels, each label keeps an
    /// example with and one without it in training.
    ///
    /// # Errors
    ///
    /// When a share is out of range, a class has one example, or there is one class.
    pub fn stratified(
        targets: &ProbeTargets,
        shares: SplitShares,
        seed: u64,
    ) -> Result<Self, ProbeError> {
        if targets.is_multi_label() {
            let rows: Vec<usize> = (0..targets.n_rows()).collect();
            return Self::grouped(targets, &rows, shares, seed);
        }
        shares.check()?;
        let mut classes = vec![Vec::new(); targets.names().len()];
        for row in 0..targets.n_rows() {
            if let Some(class) = targets.class(row) {
                classes[class].push(row);
            }
        }
        for (name, rows) in targets.names().iter().zip(&classes) {
            if rows.len() == 1 {
                return Err(ProbeError::OneExample {
                    class: name.clone(),
                });
            }
        }
        let mut random = random_of(seed);
        let mut parts = vec![SplitPart::Train; targets.n_rows()];
        let (mut n_seen, mut n_test, mut n_validation) = (0, 0, 0);
        for rows in &mut classes {
            shuffle(rows, &mut random);
            n_seen += rows.len();
            // Rounded over all classes so far: the parts have their shares together,
            // even if classes are too small for shares of their own.
            let most = rows.len().saturating_sub(1);
            let test = whole(shares.test, n_seen).saturating_sub(n_test).min(most);
            let validation = whole(shares.validation, n_seen).saturating_sub(n_validation);
            let validation = validation.min(most - test);
            n_test += test;
            n_validation += validation;
            for &row in &rows[..test] {
                parts[row] = SplitPart::Test;
            }
            for &row in &rows[test..test + validation] {
                parts[row] = SplitPart::Validation;
            }
        }
        Self::given(&parts, targets)
    }

    /// Splits at random by groups: `groups` has a number per row, and the rows of a
    /// group are in the same part (views of one picture, pictures of one person).
    /// The last group that has a class, or with several labels has or lacks a label,
    /// stays in training.
    ///
    /// # Errors
    ///
    /// When a share is out of range, the number of groups differs from that of the
    /// labels, or the labels cannot be fitted.
    pub fn grouped(
        targets: &ProbeTargets,
        groups: &[usize],
        shares: SplitShares,
        seed: u64,
    ) -> Result<Self, ProbeError> {
        shares.check()?;
        if groups.len() != targets.n_rows() {
            return Err(ProbeError::Groups {
                groups: groups.len(),
                rows: targets.n_rows(),
            });
        }
        let mut sorted: Vec<usize> = (0..groups.len()).collect();
        sorted.sort_by_key(|&row| groups[row]);
        let mut members: Vec<&[usize]> = sorted
            .chunk_by(|&row, &next| groups[row] == groups[next])
            .collect();
        shuffle(&mut members, &mut random_of(seed));

        let mut left = Kept::new(targets, &sorted);
        let mut parts = vec![SplitPart::Train; groups.len()];
        let mut taken = vec![false; members.len()];
        for (part, share) in [
            (SplitPart::Test, shares.test),
            (SplitPart::Validation, shares.validation),
        ] {
            let wanted = whole(share, groups.len());
            let mut n = 0;
            for (rows, taken) in members.iter().zip(&mut taken) {
                // A group may end beyond the share if that is nearer to it.
                let fits = n < wanted && n + rows.len() <= wanted + rows.len() / 2;
                if *taken || !fits || !left.spares(targets, rows) {
                    continue;
                }
                *taken = true;
                n += rows.len();
                left.remove(targets, rows);
                for &row in *rows {
                    parts[row] = part;
                }
            }
        }
        Self::given(&parts, targets)
    }
}

impl SplitShares {
    fn check(self) -> Result<(), ProbeError> {
        let shares = [("validation", self.validation), ("test", self.test)];
        for (part, share) in shares {
            if !(0.0..1.0).contains(&share) {
                return Err(ProbeError::Share { part, share });
            }
        }
        let both = self.validation + self.test;
        if both >= 1.0 {
            return Err(ProbeError::Share {
                part: "validation and test together",
                share: both,
            });
        }
        Ok(())
    }
}

/// Examples that are left to training: how many have and lack each class or label.
struct Kept {
    n_rows: usize,
    with: Vec<usize>,
}

impl Kept {
    fn new(targets: &ProbeTargets, rows: &[usize]) -> Self {
        Self {
            n_rows: rows.len(),
            with: targets.counts(rows),
        }
    }

    /// Returns whether all that training needs remains without `rows`.
    fn spares(&self, targets: &ProbeTargets, rows: &[usize]) -> bool {
        let n_left = self.n_rows - rows.len();
        let mut counted = self.with.iter().zip(targets.counts(rows));
        counted.all(|(&with, gone)| {
            let remains = with > gone || with == 0;
            // A class that only others lack is told as the one class.
            remains && (!targets.is_multi_label() || n_left > with - gone)
        })
    }

    fn remove(&mut self, targets: &ProbeTargets, rows: &[usize]) {
        self.n_rows -= rows.len();
        for (with, gone) in self.with.iter_mut().zip(targets.counts(rows)) {
            *with -= gone;
        }
    }
}

/// Returns the nearest whole number to a share of `n`.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a share of at most 1 of a count"
)]
fn whole(share: f64, n: usize) -> usize {
    (share * real(n)).round() as usize
}

fn random_of(seed: u64) -> ChaCha8Rng {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    ChaCha8Rng::from_seed(key)
}

/// Shuffles by Fisher and Yates. A number of 64 bits reduced to a range by a
/// product favors none by more than 2^-32 of its share.
fn shuffle<T>(items: &mut [T], random: &mut ChaCha8Rng) {
    for last in (1..items.len()).rev() {
        let product = u128::from(random.next_u64()) * (last as u128 + 1);
        let chosen = usize::try_from(product >> 64).expect("at most `last`");
        items.swap(last, chosen);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHARES: SplitShares = SplitShares {
        validation: 0.2,
        test: 0.1,
    };

    fn targets(counts: &[usize]) -> ProbeTargets {
        let names = (0..counts.len()).map(|class| format!("class {class}"));
        let classes = counts.iter().enumerate();
        let classes = classes.flat_map(|(class, &n)| vec![class; n]).collect();
        ProbeTargets::classes(names.collect(), classes).unwrap()
    }

    /// Asserts that every row is in one part, and returns the sizes.
    fn sizes(split: &ExampleSplit, n_rows: usize) -> [usize; 3] {
        let parts = [&split.train, &split.validation, &split.test];
        let mut all: Vec<usize> = parts.into_iter().flatten().copied().collect();
        all.sort_unstable();
        assert_eq!(all, (0..n_rows).collect::<Vec<_>>());
        assert!(parts.iter().all(|rows| rows.is_sorted()));
        parts.map(Vec::len)
    }

    #[test]
    fn every_class_has_its_share() {
        let targets = targets(&[100, 50, 10]);
        let split = ExampleSplit::stratified(&targets, SHARES, 1).unwrap();
        assert_eq!(sizes(&split, 160), [112, 32, 16]);
        assert_eq!(targets.counts(&split.validation), [20, 10, 2]);
        assert_eq!(targets.counts(&split.test), [10, 5, 1]);
        let again = ExampleSplit::stratified(&targets, SHARES, 1).unwrap();
        assert_eq!(split, again);
        let other = ExampleSplit::stratified(&targets, SHARES, 2).unwrap();
        assert_ne!(split, other);
    }

    #[test]
    fn a_seed_is_the_same_split_for_ever() {
        let split = ExampleSplit::stratified(&targets(&[6, 6]), SHARES, 7).unwrap();
        assert_eq!(split.validation, [5, 9]);
        assert_eq!(split.test, [1]);
    }

    #[test]
    fn small_classes_have_shares_together() {
        // Of 4 examples no part would have a tenth; of 400 it has 40.
        let targets = targets(&[4; 100]);
        let split = ExampleSplit::stratified(&targets, SHARES, 5).unwrap();
        assert_eq!(sizes(&split, 400), [280, 80, 40]);
        assert!(targets.counts(&split.train).iter().all(|&n| n >= 1));
        let twos = self::targets(&[2; 10]);
        let split = ExampleSplit::stratified(&twos, SHARES, 5).unwrap();
        assert!(twos.counts(&split.train).iter().all(|&n| n >= 1));
    }

    #[test]
    fn what_cannot_be_split_is_named() {
        let text = |counts: &[usize], shares| {
            let error = ExampleSplit::stratified(&targets(counts), shares, 0).unwrap_err();
            error.to_string()
        };
        let one = text(&[5, 1], SHARES);
        assert!(one.contains("class \"class 1\" has 1 example"), "{one}");
        let none = text(&[5, 0, 4], SHARES);
        assert!(
            none.contains("\"class 1\" has no example in the training"),
            "{none}"
        );
        let one = text(&[5, 0], SHARES);
        assert!(one.contains("one class, \"class 0\""), "{one}");
        let mut shares = SHARES;
        shares.test = -0.5;
        let share = text(&[5, 5], shares);
        assert!(share.contains("share of test is -0.5"), "{share}");
        shares.test = 0.85;
        let both = text(&[5, 5], shares);
        assert!(both.contains("together is 1.05"), "{both}");
        shares.validation = f64::NAN;
        let nan = text(&[5, 5], shares);
        assert!(nan.contains("share of validation is NaN"), "{nan}");
    }

    #[test]
    fn groups_stay_together() {
        let targets = targets(&[200, 100]);
        // Groups of 1 to 9 rows, which are apart.
        let groups: Vec<usize> = (0..300).map(|row| row * row % 61).collect();
        let split = ExampleSplit::grouped(&targets, &groups, SHARES, 4).unwrap();
        let sizes = sizes(&split, 300);
        assert!(sizes[1].abs_diff(60) < 10 && sizes[2].abs_diff(30) < 10);
        let groups_of = |rows: &[usize]| {
            let mut of: Vec<usize> = rows.iter().map(|&row| groups[row]).collect();
            of.sort_unstable();
            of.dedup();
            of
        };
        let train = groups_of(&split.train);
        let validation = groups_of(&split.validation);
        let test = groups_of(&split.test);
        assert!(
            train
                .iter()
                .all(|g| !validation.contains(g) && !test.contains(g))
        );
        assert!(validation.iter().all(|g| !test.contains(g)));
        let few = ExampleSplit::grouped(&targets, &groups[..9], SHARES, 4);
        assert_eq!(
            few,
            Err(ProbeError::Groups {
                groups: 9,
                rows: 300
            })
        );
    }

    #[test]
    fn the_last_group_of_a_class_stays_in_training() {
        // Class 1 is in one group of many.
        let targets = targets(&[40, 3]);
        let groups: Vec<usize> = (0..43).map(|row| row.min(40)).collect();
        let mut shares = SHARES;
        shares.validation = 0.5;
        shares.test = 0.4;
        for seed in 0..20 {
            let split = ExampleSplit::grouped(&targets, &groups, shares, seed).unwrap();
            assert!([40, 41, 42].iter().all(|row| split.train.contains(row)));
            assert!(split.train.len() < 10);
        }
    }

    #[test]
    fn each_label_keeps_both_values_in_training() {
        let n = 50;
        // One example has label 0, one lacks label 1.
        let values = (0..n).flat_map(|row| [row == 3, row != 8, row % 2 == 0]);
        let names = ["a", "b", "c"].map(str::to_owned).to_vec();
        let targets = ProbeTargets::labels(names.clone(), n, values.collect()).unwrap();
        for seed in 0..20 {
            let split = ExampleSplit::stratified(&targets, SHARES, seed).unwrap();
            assert_eq!(sizes(&split, n), [35, 10, 5]);
            assert!(split.train.contains(&3) && split.train.contains(&8));
        }
        let values = (0..n).flat_map(|row| [row == 3, true, row % 2 == 0]);
        let targets = ProbeTargets::labels(names, n, values.collect()).unwrap();
        let error = ExampleSplit::stratified(&targets, SHARES, 0).unwrap_err();
        let error = error.to_string();
        assert!(error.contains("label \"b\" is true in all"), "{error}");
    }

    #[test]
    fn a_given_split_is_checked() {
        use SplitPart::{Test, Train, Validation};
        let targets = targets(&[3, 2]);
        let split = ExampleSplit::given(&[Train, Validation, Test, Test, Train], &targets).unwrap();
        assert_eq!(split.train, [0, 4]);
        assert_eq!(split.validation, [1]);
        assert_eq!(split.test, [2, 3]);
        let error = ExampleSplit::given(&[Train, Validation, Test, Test, Test], &targets);
        assert!(matches!(error, Err(ProbeError::OneClass { .. })));
        let error = ExampleSplit::given(&[Train], &targets);
        assert!(matches!(error, Err(ProbeError::Parts { .. })));
    }
}
