-- Keys that are of another type than they should be are renamed. KEYS: the keys; ARGV: the type of each.
-- Returns {key, the type found} of each that was renamed, one after the other.
local found = {}
for i, key in ipairs(KEYS) do
  local kind = redis.call('TYPE', key).ok
  if kind ~= 'none' and kind ~= ARGV[i] then
    redis.call('RENAME', key, 'smtpdup:aside:' .. key)
    found[#found + 1] = key
    found[#found + 1] = kind
  end
end
return found
