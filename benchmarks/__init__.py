"""The gateway's cost, compared with a bare pipeline that is measured in the same run: `make bench`."""
