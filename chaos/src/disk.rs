//! A small file system of its own, to be filled to the last byte; where root allows it.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const IMAGE_BYTES: u64 = 512 << 20;

/// A mounted file system; unmounted when it is dropped.
pub struct SmallDisk {
    image: PathBuf,
    /// Where it is mounted.
    pub folder: PathBuf,
}

impl SmallDisk {
    /// Mounts one beside the history. The error says what the machine does not allow.
    pub fn mount(folder: &Path) -> Result<Self, String> {
        let disk = Self { image: folder.join("disk.img"), folder: folder.join("disk") };
        let told = |error: std::io::Error| error.to_string();
        // One that an ended campaign left behind.
        drop(disk.unmount());
        std::fs::create_dir_all(&disk.folder).map_err(told)?;
        let image = std::fs::File::create(&disk.image).map_err(told)?;
        image.set_len(IMAGE_BYTES).map_err(told)?;
        let (image, folder) = (disk.image.as_os_str(), disk.folder.as_os_str());
        run(Command::new("mkfs.ext4").args(["-q", "-F", "-m", "0"]).arg(image))?;
        run(Command::new("mount").args(["-o", "loop"]).arg(image).arg(folder))?;
        Ok(disk)
    }

    fn unmount(&self) -> Result<(), String> {
        run(Command::new("umount").arg(&self.folder))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        if let Err(error) = self.unmount() {
            tracing::warn!("{error}: unmount {} by hand", self.folder.display());
        }
        drop(std::fs::remove_file(&self.image));
    }
}

fn run(command: &mut Command) -> Result<(), String> {
    command.stdin(Stdio::null()).env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin");
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim()))
}
