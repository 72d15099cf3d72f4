//! Copies of an engine between the host and its device: by ONNX Runtime, or by
//! the driver.
#![expect(
    unsafe_code,
    reason = "tensors of a device are known by their addresses alone"
)]

use ort::value::{DefiniteTensorValueTypeMarker, Value};

use crate::gpu::copies::{CopyPart, DriverCopies};
use crate::model::precision::Provider;
use crate::runtime::error::{EngineError, runtime};
use crate::runtime::{GpuCopies, Runtime};

/// Copies of one engine between tensors of the host and of its device, which
/// all its graphs use in turn.
pub(super) struct EngineCopies {
    /// The driver's copies; `None` for those of ONNX Runtime.
    driver: Option<DriverCopies>,
    /// Reason why the driver's copies, which were asked for, are not used.
    refusal: Option<String>,
}

impl EngineCopies {
    /// Copies by ONNX Runtime.
    pub(super) fn by_runtime() -> Self {
        Self {
            driver: None,
            refusal: None,
        }
    }

    /// Copies in the way that a flag asks for; by ONNX Runtime if the driver
    /// cannot be used. No other engine may be capturing.
    pub(super) fn open(way: GpuCopies, runtime: &Runtime) -> Self {
        let mut copies = Self::by_runtime();
        if way == GpuCopies::Driver && runtime.provider == Provider::Cuda {
            copies.take(DriverCopies::open(runtime.device_id));
        }
        copies
    }

    /// Uses the driver's copies, or notes why they cannot be used.
    pub(super) fn take(&mut self, opened: Result<DriverCopies, String>) {
        match opened {
            Ok(driver) => self.driver = Some(driver),
            Err(reason) => self.refuse(reason),
        }
    }

    fn refuse(&mut self, reason: String) {
        tracing::warn!(
            reason,
            "cannot copy over the driver; ONNX Runtime copies between the host and the GPU"
        );
        self.driver = None;
        self.refusal = Some(reason);
    }

    /// True if copies need tensors on the device that stay where they are, also
    /// for runs that are not captured.
    pub(super) fn are_the_drivers(&self) -> bool {
        self.driver.is_some()
    }

    /// Returns the reason why the driver's copies, which were asked for, are not
    /// used.
    pub(super) fn refusal(&self) -> Option<&str> {
        self.refusal.as_deref()
    }

    /// Prepares copies of these tensors to and from the device, of all of `up`
    /// together. No other engine may be capturing.
    pub(super) fn reserve<T, U>(&mut self, up: &[&Value<T>], down: &Value<U>)
    where
        T: DefiniteTensorValueTypeMarker + ?Sized,
        U: DefiniteTensorValueTypeMarker + ?Sized,
    {
        let Some(driver) = &mut self.driver else {
            return;
        };
        // A tensor of unknown size is refused when it is copied.
        let up = up.iter().filter_map(|tensor| bytes(tensor)).sum();
        if let Err(reason) = driver.reserve(up, bytes(down).unwrap_or(0)) {
            self.refuse(reason);
        }
    }

    /// Copies tensors of the host to tensors of the device, pair by pair.
    pub(super) fn upload<'a, T>(
        &mut self,
        pairs: impl IntoIterator<Item = (&'a mut Value<T>, &'a mut Value<T>)>,
    ) -> Result<(), EngineError>
    where
        T: DefiniteTensorValueTypeMarker + ?Sized + 'a,
    {
        let Some(driver) = &mut self.driver else {
            for (host, device) in pairs {
                host.copy_into(device).map_err(runtime)?;
            }
            return Ok(());
        };
        let parts = pairs.into_iter().map(|(host, device)| part(host, device));
        let parts = parts.collect::<Result<Vec<_>, _>>()?;
        // SAFETY: `part` has checked the sizes, both tensors are borrowed until
        // the call returns, and no run is under way, which might use them.
        unsafe { driver.upload(&parts) }.map_err(runtime)
    }

    /// Copies a tensor of the device to one of the host.
    pub(super) fn download<T>(
        &mut self,
        device: &mut Value<T>,
        host: &mut Value<T>,
    ) -> Result<(), EngineError>
    where
        T: DefiniteTensorValueTypeMarker + ?Sized,
    {
        let Some(driver) = &mut self.driver else {
            return device.copy_into(host).map_err(runtime);
        };
        let part = part(host, device)?;
        // SAFETY: as for the upload.
        unsafe { driver.download(&[part]) }.map_err(runtime)
    }
}

/// Returns the bytes of a pair of tensors.
fn part<T>(host: &mut Value<T>, device: &mut Value<T>) -> Result<CopyPart, EngineError>
where
    T: DefiniteTensorValueTypeMarker + ?Sized,
{
    if host.dtype() != device.dtype() {
        return Err(EngineError::Runtime(format!(
            "a tensor of {:?} cannot be copied to or from one of {:?}",
            host.dtype(),
            device.dtype()
        )));
    }
    if !host.memory_info().is_cpu_accessible() {
        return Err(EngineError::Runtime(
            "the host's side of a copy is not in the host's memory".to_owned(),
        ));
    }
    let bytes = bytes(host)
        .ok_or_else(|| EngineError::Runtime("texts cannot be copied to a device".to_owned()))?;
    Ok(CopyPart {
        host: host.data_ptr_mut().cast(),
        device: device.data_ptr_mut(),
        bytes,
    })
}

/// Returns the size of a tensor; `None` for texts.
fn bytes<T>(tensor: &Value<T>) -> Option<usize>
where
    T: DefiniteTensorValueTypeMarker + ?Sized,
{
    tensor.data_type().byte_size(tensor.shape().num_elements())
}

#[cfg(test)]
pub(super) mod tests;
