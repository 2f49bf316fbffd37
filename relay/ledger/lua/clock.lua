-- Put in front of the scripts that need the time: seconds since the epoch, and the same as text.
local function clock()
  local time = redis.call('TIME')
  return time[1] + time[2] / 1000000, time[1] .. '.' .. string.format('%06d', time[2])
end
