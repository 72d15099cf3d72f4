//! The batch sizes that an engine runs at.
//!
//! Every size is run once before the worker is ready (warm-up), so that no
//! caller waits for a first run; smaller batches are padded. Fixed sizes keep a
//! GPU's memory use constant, and CUDA graphs are captured per size.

/// Batch sizes in ascending order; never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Buckets(Vec<usize>);

impl Buckets {
    /// Returns 1, 2, 4 and so on up to `largest`, which is always included.
    #[must_use]
    pub fn powers_of_two(largest: usize) -> Self {
        let largest = largest.max(1);
        let powers = std::iter::successors(Some(1_usize), |size| size.checked_mul(2));
        let mut sizes: Vec<usize> = powers.take_while(|&size| size < largest).collect();
        sizes.push(largest);
        Self(sizes)
    }

    /// Returns one size alone.
    #[must_use]
    pub fn one(size: usize) -> Self {
        Self(vec![size.max(1)])
    }

    /// Takes `sizes` if they ascend and begin with at least 1.
    #[must_use]
    pub fn ascending(sizes: Vec<usize>) -> Option<Self> {
        let ascends = sizes.windows(2).all(|pair| pair[0] < pair[1]);
        (ascends && sizes.first().is_some_and(|&size| size > 0)).then_some(Self(sizes))
    }

    /// Iterates over the sizes in ascending order.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = usize> {
        self.0.iter().copied()
    }

    #[must_use]
    pub fn smallest(&self) -> usize {
        self.0.first().copied().unwrap_or(1)
    }

    #[must_use]
    pub fn largest(&self) -> usize {
        self.0.last().copied().unwrap_or(1)
    }

    /// Returns the smallest size that holds `n` images, or else the largest
    /// size.
    #[must_use]
    pub fn at_least(&self, n: usize) -> usize {
        let found = self.iter().find(|&size| size >= n);
        found.unwrap_or_else(|| self.largest())
    }

    /// Returns the largest size that `n` images fill, or else the smallest
    /// size.
    #[must_use]
    pub fn at_most(&self, n: usize) -> usize {
        let found = self.iter().rev().find(|&size| size <= n);
        found.unwrap_or_else(|| self.smallest())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        let check = |largest, expected: &[usize]| {
            let sizes: Vec<usize> = Buckets::powers_of_two(largest).iter().collect();
            assert_eq!(sizes, expected);
        };
        check(0, &[1]);
        check(1, &[1]);
        check(8, &[1, 2, 4, 8]);
        check(12, &[1, 2, 4, 8, 12]);
        assert_eq!(Buckets::ascending(vec![]), None);
        assert_eq!(Buckets::ascending(vec![0, 1]), None);
        assert_eq!(Buckets::ascending(vec![4, 4]), None);
        let buckets = Buckets::ascending(vec![2, 8]).expect("ascends");
        assert_eq!(
            [1, 2, 3, 8, 9].map(|n| buckets.at_least(n)),
            [2, 2, 8, 8, 8]
        );
        assert_eq!([1, 2, 7, 8, 9].map(|n| buckets.at_most(n)), [2, 2, 2, 8, 8]);
    }
}
